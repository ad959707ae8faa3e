"""A prepared dataset or a decoded cache that was damaged is named in one line; none is believed."""

import random
import shutil

import pytest

from cnn.data import cache, load_dataset
from cnn.errors import UserError
from cnn.runtime.checksums import MANIFEST
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
    lines = (digits_dir / MANIFEST).read_text().splitlines()
    assert tuple(line.split("  ")[1] for line in lines[:-1]) == FILES[1:]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name, digits_dir):
    file = digits_dir / name
    content = file.read_bytes()
    damaged = [b"", content[:-1], content[: len(content) // 2], content + b"\0"]
    damaged += [flipped(content, *place) for place in some_places(content, 12, seed=name)]
    for other in damaged:
        file.write_bytes(other)
        fault = "is damaged" if name == MANIFEST else "was changed"
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


def test_a_dataset_deleted_as_told_is_prepared_again(digits_dir):
    expected = load_dataset("digits").fingerprint
    file = digits_dir / FILES[2]
    file.write_bytes(file.read_bytes()[1:])
    assert f"delete {digits_dir} to" in message_of()
    shutil.rmtree(digits_dir)
    assert load_dataset("digits").fingerprint == expected
    assert (digits_dir / MANIFEST).is_file()


def test_what_a_file_manager_leaves_is_no_damage(digits_dir):
    (digits_dir / ".DS_Store").write_bytes(b"\0")
    assert len(load_dataset("digits").test) == 360


def test_records_without_a_manifest(digits_dir):
    """As stock TFDS prepares: Riegeli's hashes are what stands between a flip and an image."""
    expected = load_dataset("digits").fingerprint
    (digits_dir / MANIFEST).unlink()
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
    (digits_dir / MANIFEST).unlink()
    file = digits_dir / "dataset_info.json"
    file.write_text(file.read_text().replace('"1437"', f'"{number}"'))
    assert f"the files hold 1437 examples, not {number}" in message_of()


@pytest.fixture
def loaded(digits_dir, capsys):
    """Gives (the cache's file, a function: what stderr tells of a cache of this content)."""
    load_dataset("digits")
    (file,) = (cache_directory() / "decoded").iterdir()
    capsys.readouterr()

    def told(content):
        file.write_bytes(content)
        assert cache.load(digits_dir, "digits") is None
        return capsys.readouterr().err

    return file, told


def test_a_flip_in_the_cache_is_named(loaded):
    """All bytes of the header and between the arrays, and some of the arrays."""
    file, told = loaded
    content = file.read_bytes()
    header = content.index(b"\n")
    header += 64 - header % 64
    places = [(where, where % 8) for where in range(header)] + some_places(content, 200, seed=0)
    for place in places:
        line = told(flipped(content, *place))
        assert line.startswith(f"cnn: the decoded images in {file} are damaged (")
        assert line.endswith("); decoding them anew\n")
        assert line.count("\n") == 1


def test_each_bit_of_the_caches_checksum_counts(loaded):
    file, told = loaded
    content = file.read_bytes()
    for where in range(9):
        for bit in range(8):
            assert "its first line" in told(flipped(content, where, bit))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda content: b"", "empty"),
        (lambda content: content[:100], "its first line"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda content: content + b"\0", "too long"),
        (lambda content: bytes(len(content)), "its first line"),
        (lambda content: b"\n\xff" * 100, "its first line"),
    ],
)
def test_what_is_wrong_with_a_cache(damage, what, loaded):
    file, told = loaded
    line = told(damage(file.read_bytes()))
    assert what in line
    assert line.count("\n") == 1


def test_all_padding_of_the_cache_counts(loaded):
    file, told = loaded
    content = file.read_bytes()
    start = content.index(b"\n") + 1
    sizes = (1437 * 64, 1437 * 4, 360 * 64, 360 * 4)
    gaps = []
    for size in sizes:
        gaps += range(start, start := start + -start % 64)
        start += size
    assert start == len(content)
    assert len(gaps) > 60
    for where in gaps:
        assert "bytes between the arrays" in told(flipped(content, where, where % 8))
