"""A prepared dataset or a decoded cache that was damaged is named in one line; none is believed."""

import json
import random
import shutil

import pytest

from cnn.data import cache, load_dataset
from cnn.errors import UserError
from cnn.runtime.checksums import CHECKSUMS
from cnn.runtime.disk import cache_directory

FILES = (
    "SHA256SUMS",
    "dataset_info.json",
    "digits-test.array_record-00000-of-00001",
    "digits-train.array_record-00000-of-00001",
    "features.json",
)


def message_of(name="digits"):
    with pytest.raises(UserError) as error:
        load_dataset(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def flipped(content, where, bit):
    return content[:where] + bytes([content[where] ^ 1 << bit]) + content[where + 1 :]


def some_places(content, number, seed):
    """First, middle, last, and random ones, each with a bit."""
    rng = random.Random(seed)
    places = [0, len(content) // 2, len(content) - 1]
    places += [rng.randrange(len(content)) for _ in range(number)]
    return [(where, rng.randrange(8)) for where in places]


def test_all_files_are_listed(digits_dir):
    assert tuple(sorted(path.name for path in digits_dir.iterdir())) == FILES
    lines = (digits_dir / CHECKSUMS).read_text().splitlines()
    assert tuple(line.split("  ")[1] for line in lines[:-1]) == FILES[1:]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name, digits_dir):
    file = digits_dir / name
    content = file.read_bytes()
    damaged = [b"", content[:-1], content[: len(content) // 2], content + b"\0"]
    damaged += [flipped(content, *place) for place in some_places(content, 12, seed=name)]
    for other in damaged:
        file.write_bytes(other)
        fault = "is damaged" if name == CHECKSUMS else "was changed"
        assert message_of() == (
            f"the prepared digits is damaged ({name} {fault}): delete {digits_dir} to have it "
            "prepared again"
        )
    file.write_bytes(content)
    assert len(load_dataset("digits").test) == 360


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(name, digits_dir):
    (digits_dir / name).unlink()
    for _ in range(2):
        message = message_of()
        assert f"({name} is missing): delete " in message
        assert str(digits_dir) in message


def test_a_dataset_that_was_deleted_is_prepared_again(digits_dir):
    expected = load_dataset("digits").fingerprint
    file = digits_dir / FILES[2]
    file.write_bytes(file.read_bytes()[1:])
    assert f"delete {digits_dir} to" in message_of()
    shutil.rmtree(digits_dir)
    assert load_dataset("digits").fingerprint == expected
    assert (digits_dir / CHECKSUMS).is_file()


def test_what_a_file_manager_leaves_is_no_damage(digits_dir):
    (digits_dir / ".DS_Store").write_bytes(b"\0")
    assert len(load_dataset("digits").test) == 360


def test_records_without_a_manifest(digits_dir):
    """As stock TFDS prepares: Riegeli's hashes are what stands between a flip and an image."""
    expected = load_dataset("digits").fingerprint
    (digits_dir / CHECKSUMS).unlink()
    outcomes = []
    for name in FILES[2:4]:
        content = (digits_dir / name).read_bytes()
        for place in some_places(content, 4, seed=name):
            (digits_dir / name).write_bytes(flipped(content, *place))
            try:
                outcomes.append(load_dataset("digits").fingerprint)
            except UserError as error:
                outcomes.append(str(error))
        (digits_dir / name).write_bytes(content)
    named = [outcome for outcome in outcomes if outcome != expected]  # else what fills up a block
    assert named
    for message in named:
        assert message.startswith("cannot read the prepared digits (")
        assert message.endswith(f"): delete {digits_dir} to have it prepared again")
        assert "\n" not in message


@pytest.mark.parametrize("number", [437, 1436, 1438])
def test_a_wrong_number_of_examples_without_a_manifest(number, digits_dir):
    (digits_dir / CHECKSUMS).unlink()
    file = digits_dir / "dataset_info.json"
    file.write_text(file.read_text().replace('"1437"', f'"{number}"'))
    assert f"the files hold 1437 examples, not {number}" in message_of()


@pytest.fixture
def cache_files(digits_dir, capsys):
    """Gives (the files of the cache, a function: the warning if one of them has this content)."""
    load_dataset("digits")
    (folder,) = (cache_directory() / "decoded").iterdir()
    capsys.readouterr()

    def warning(file, content):
        whole = file.read_bytes()
        file.write_bytes(content)
        assert cache.load(cache.Key(digits_dir), "digits") is None
        file.write_bytes(whole)
        line = capsys.readouterr().err
        assert line.startswith(f"warning: the decoded images in {folder} are damaged (")
        assert line.endswith("); the dataset is decoded again\n")
        assert line.count("\n") == 1
        return line

    files = sorted(folder.iterdir())
    yield files, warning
    assert cache.load(cache.Key(digits_dir), "digits") is not None


def test_a_flip_in_the_cache_is_named(cache_files):
    """All bytes of meta.json, a quarter of the .npy headers, and some bytes of the arrays."""
    files, warning = cache_files
    for file in files:
        content = file.read_bytes()
        header = range(len(content)) if file.name == "meta.json" else range(0, 128, 4)
        places = [(where, where % 8) for where in header]
        for place in places + some_places(content, 50, seed=file.name):
            line = warning(file, flipped(content, *place))
            assert file.name == "meta.json" or f"({file.name} was changed)" in line


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: b"\n\xff" * 100,
        lambda content: b"[" * 100_000,
        lambda content: b"[]",
        lambda content: b"1",
        lambda content: b"{}",
    ],
)
def test_a_damaged_cache_is_named(damage, cache_files):
    files, warning = cache_files
    for file in files:
        content = damage(file.read_bytes())
        line = warning(file, content)
        fault = f"({file.name} was changed)" if content else "(cannot mmap an empty file)"
        assert file.name == "meta.json" or fault in line


@pytest.mark.parametrize("field", ["class_names", "mean", "std", "fingerprint", "checksums"])
def test_a_damaged_field_of_the_cache_is_named(field, cache_files):
    (meta, *_), warning = cache_files
    content = json.loads(meta.read_bytes())
    content[field] = list(reversed(content[field])) if field != "fingerprint" else "0" * 64
    if field in ("mean", "std"):
        content[field] = [0.5]
    assert "(meta.json was changed)" in warning(meta, json.dumps(content).encode())
