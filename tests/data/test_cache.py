"""Decoded once; a cache that is damaged, stale or impossible is noticed."""

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from cnn.data import load_dataset, sources
from cnn.data.dataset import fingerprint
from cnn.runtime.checksums import write_manifest
from cnn.runtime.disk import cache_directory


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often a dataset is decoded."""
    calls = []
    decode = sources._decode
    monkeypatch.setattr(sources, "_decode", lambda *args: calls.append(args) or decode(*args))
    return calls


def cache_file():
    (file,) = (cache_directory() / "decoded").iterdir()
    return file


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
    return capsys.readouterr().err.count("cnn: the decoded images in ")


@pytest.mark.parametrize("where", [0.0, 0.002, 0.5, 0.97, 0.9999])
def test_a_flipped_bit_is_noticed(where, digits_dir, decoded, capsys):
    expected = load_dataset("digits").fingerprint
    assert not complaints(capsys)
    file = cache_file()
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)
    assert load_dataset("digits").fingerprint == expected
    assert complaints(capsys) == 1
    assert len(decoded) == 2
    load_dataset("digits")
    assert len(decoded) == 2  # it was rebuilt


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "deleted", "nonsense"])
def test_damage_is_noticed(damage, digits_dir, decoded, capsys):
    expected = load_dataset("digits").fingerprint
    file = cache_file()
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
    write_manifest(prepared)
    assert len(load_dataset("digits").train) == 360
    assert len(decoded) == 2
    assert cache_file().is_file()  # one file: the stale one is gone
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
    assert error.count("XDG_CACHE_HOME") == error.count("cnn: ") == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_cache_that_cannot_be_read_is_left_as_it_is(
    number, digits_dir, decoded, monkeypatch, capsys
):
    expected = load_dataset("digits").fingerprint
    file = cache_file()
    before = (file.stat().st_ino, file.read_bytes())

    def memmap(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", memmap)
        capsys.readouterr()
        assert load_dataset("digits").fingerprint == expected
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("cnn: "))
    assert line.startswith(
        f"cnn: the decoded images in {file} cannot be read ({os.strerror(number)})"
    )
    assert (file.stat().st_ino, file.read_bytes()) == before
    load_dataset("digits")
    assert len(decoded) == 2  # it is used again


def test_temporary_files_of_killed_processes_are_removed(digits_dir):
    load_dataset("digits")
    file = cache_file()
    old, new = file.with_name(f"{file.name}.old.tmp"), file.with_name(f"{file.name}.new.tmp")
    old.write_text(""), new.write_text("")
    os.utime(old, (time.time() - 90_000,) * 2)
    file.write_bytes(b"")
    load_dataset("digits")
    assert not old.exists()
    assert new.exists()  # perhaps another process is writing it


def test_two_processes_at_once(data_dir):
    script = "from cnn.data import load_dataset; print(load_dataset('digits').fingerprint)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert outputs == {load_dataset("digits").fingerprint + "\n"}
    assert [path.name for path in (data_dir / "digits").iterdir()] == ["1.0.0"]
