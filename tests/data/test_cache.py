"""Decoded once; a cache that is damaged, stale or impossible is noticed."""

import contextlib
import errno
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from cnn.data import cache, load_dataset, sources
from cnn.data.dataset import fingerprint
from cnn.runtime.checksums import write_checksums
from cnn.runtime.disk import cache_directory


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often a dataset is decoded."""
    calls = []
    decode = sources._decode
    monkeypatch.setattr(sources, "_decode", lambda *args: calls.append(args) or decode(*args))
    return calls


FILES = ("meta.json", "test_images.npy", "test_labels.npy", "train_images.npy", "train_labels.npy")


def cache_folder():
    (folder,) = (cache_directory() / "decoded").iterdir()
    assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
    return folder


def test_second_load_maps_the_arrays_and_does_not_import_tfds(digits_dir):
    first = load_dataset("digits")
    script = (
        "import sys\nfrom cnn.data import load_dataset\n"
        "data = load_dataset('digits')\n"
        "assert not {'tensorflow_datasets', 'tensorflow', 'sklearn'} & set(sys.modules)\n"
        "print(data.fingerprint, data.mean.tolist(), data.std.tolist(), data.class_names)"
    )
    output = subprocess.check_output([sys.executable, "-W", "error", "-c", script], text=True)
    expected = (first.fingerprint, first.mean.tolist(), first.std.tolist(), first.class_names)
    assert output.strip() == " ".join(map(str, expected))


def test_hit_equals_miss(digits_dir, decoded):
    first, second = load_dataset("digits"), load_dataset("digits")
    assert len(decoded) == 1
    for a, b in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert not b.images.flags.writeable
    assert first.fingerprint == second.fingerprint
    assert second.fingerprint == fingerprint(second.train, second.test)


def complaints(capsys):
    """How many lines on stderr are not bars."""
    return capsys.readouterr().err.count("warning: the decoded images in ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 0.9999])
def test_a_flipped_bit_is_noticed(name, where, digits_dir, decoded, capsys):
    expected = load_dataset("digits").fingerprint
    assert not complaints(capsys)
    file = cache_folder() / name
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)
    assert load_dataset("digits").fingerprint == expected
    assert complaints(capsys) == 1
    assert len(decoded) == 2
    load_dataset("digits")
    assert len(decoded) == 2  # it was rebuilt


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "deleted", "nonsense"])
def test_damage_is_noticed(damage, name, digits_dir, decoded, capsys):
    expected = load_dataset("digits").fingerprint
    file = cache_folder() / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(
            {
                "truncated": content[:-1],
                "longer": content + b"x",
                "empty": b"",
                "nonsense": b"\n\xff" * 100,
            }[damage]
        )
    assert load_dataset("digits").fingerprint == expected
    assert complaints(capsys) == (damage != "deleted")
    assert len(decoded) == 2
    load_dataset("digits")
    assert len(decoded) == 2
    assert not complaints(capsys)


def test_prepared_anew_with_other_content(digits_dir, decoded, capsys):
    """Stale: the directory of the same name now holds other files. The old cache is replaced."""
    load_dataset("digits")
    prepared = digits_dir
    info = json.loads((prepared / "dataset_info.json").read_text())
    train, test = info["splits"]
    train["name"], test["name"] = "test", "train"
    train["filepathTemplate"] = test["filepathTemplate"] = (
        "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    a, b = sorted(prepared.glob("digits-*"))
    a.rename(prepared / "x"), b.rename(a), (prepared / "x").rename(b)
    write_checksums(prepared)
    assert len(load_dataset("digits").train) == 360
    assert len(decoded) == 2
    assert np.load(cache_folder() / "train_labels.npy").shape == (360,)  # the stale one is gone
    assert not complaints(capsys)  # stale is not damaged


def test_touched_file_counts_as_changed(digits_dir, decoded):
    load_dataset("digits")
    file = next(digits_dir.glob("digits-train*"))
    os.utime(file, (1, 1))
    load_dataset("digits")
    assert len(decoded) == 2


def test_cache_directory_that_cannot_be_written(digits_dir, tmp_path, monkeypatch, capsys, decoded):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    first, second = load_dataset("digits"), load_dataset("digits")
    assert len(decoded) == 2
    assert first.fingerprint == second.fingerprint
    assert not second.train.images.flags.writeable
    error = capsys.readouterr().err
    assert error.count("XDG_CACHE_HOME") == error.count("warning: ") == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_cache_that_cannot_be_read_is_left_as_it_is(
    number, digits_dir, decoded, monkeypatch, capsys
):
    expected = load_dataset("digits").fingerprint
    folder = cache_folder()
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}

    def open_(path, *args, _open=open, **kwargs):
        if str(path) == str(folder / "test_labels.npy"):
            raise OSError(number, os.strerror(number), str(path))
        return _open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", open_)
        capsys.readouterr()
        assert load_dataset("digits").fingerprint == expected
    assert capsys.readouterr().err.startswith(
        f"warning: the decoded images in {folder} cannot be read ({os.strerror(number)})"
    )
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()} == before
    load_dataset("digits")
    assert len(decoded) == 2  # it is used again


def test_temporary_folders_of_killed_processes_are_deleted(digits_dir):
    load_dataset("digits")
    folder = cache_folder()
    old, new = (folder.with_name(f"{folder.name}.{age}.tmp") for age in ("old", "new"))
    for path in (old, new):
        shutil.copytree(folder, path / "new")
    os.utime(old, (time.time() - 90_000,) * 2)
    (folder / "meta.json").write_bytes(b"")
    load_dataset("digits")
    assert not old.exists()
    assert new.exists()  # perhaps another process is writing it


@pytest.mark.parametrize("call", range(1, 12))
def test_a_writer_that_is_killed(call, digits_dir, decoded, monkeypatch):
    """After each of its calls that change the disk: what it leaves is never taken for a cache."""
    expected = load_dataset("digits").fingerprint
    (cache_folder() / "train_images.npy").write_bytes(b"")
    calls = []

    def killing(function):
        def run(*args, **kwargs):
            calls.append(function)
            if len(calls) > call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # it is dead
        for name in ("numpy.save", "os.mkdir", "os.rename", "pathlib.Path.write_text"):
            function = pkgutil.resolve_name(name)
            patch.setattr(name, killing(function))
        load_dataset("digits")
    for _ in range(2):
        assert load_dataset("digits").fingerprint == expected
    assert len(decoded) == 3 - (len(calls) <= call)


def test_several_processes_at_once(data_dir):
    """They start without a cache, and then with a damaged one, which each of them replaces."""
    script = "from cnn.data import load_dataset; print(load_dataset('digits').fingerprint)"

    def start_all():
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(3)
        ]
        return {process.communicate()[0] for process in processes}

    outputs = start_all()
    assert outputs == {load_dataset("digits").fingerprint + "\n"}
    assert [path.name for path in (data_dir / "digits").iterdir()] == ["1.0.0"]
    (cache_folder() / "train_images.npy").write_bytes(b"")
    assert start_all() == outputs
    assert cache.load(cache.Key(data_dir / "digits" / "1.0.0"), "digits") is not None
    cache_folder()  # the only one: nothing else is left
