"""Each byte of a folder, and of the list of its digests, is covered."""

import shutil
import subprocess

import pytest

from cnn.runtime.checksums import CHECKSUMS, verify_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "state" / "d").mkdir(parents=True)
    for name, content in {"a": b"1", "state/d/b c": b"23", "state/empty": b""}.items():
        (folder / name).write_bytes(content)
    write_checksums(folder)
    return folder


def faults(folder):
    lax, strict = (verify_checksums(folder, strict=strict) for strict in (False, True))
    assert lax == strict
    return strict


def test_untouched(folder):
    assert faults(folder) is None
    assert [path.name for path in folder.iterdir() if path.is_file()].count(CHECKSUMS) == 1
    before = (folder / CHECKSUMS).read_bytes()
    write_checksums(folder)
    assert (folder / CHECKSUMS).read_bytes() == before
    assert len(list(folder.iterdir())) == 3


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no coreutils here")
def test_coreutils_agree(folder):
    command = ["sha256sum", "--check", "--strict", CHECKSUMS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "a: OK\nstate/d/b c: OK\nstate/empty: OK\n"
    (folder / "a").write_bytes(b"2")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", ["a", "state/d/b c", "state/empty"])
def test_a_file_that_is_changed_longer_or_missing_is_named(name, folder):
    content = (folder / name).read_bytes()
    for other in {content + b"x", content[:-1], bytes(len(content))} - {content}:
        (folder / name).write_bytes(other)
        assert faults(folder) == f"{name} was changed"
    (folder / name).unlink()
    assert faults(folder) == f"{name} is missing"
    (folder / name).mkdir()
    assert faults(folder) == f"{name} is a folder"


def test_every_damage_of_the_manifest_is_named(folder):
    content = (folder / CHECKSUMS).read_bytes()
    damaged = [content[:end] for end in range(len(content))]
    for where in range(len(content)):
        damaged += [
            content[:where] + bytes([content[where] ^ 1 << bit]) + content[where + 1 :]
            for bit in range(8)
        ]
    for other in [*damaged, content + b"\n", content + content]:
        (folder / CHECKSUMS).write_bytes(other)
        assert faults(folder) == f"{CHECKSUMS} is damaged"


def test_no_manifest(folder):
    (folder / CHECKSUMS).unlink()
    assert faults(folder) == f"{CHECKSUMS} is missing"
    shutil.rmtree(folder)
    assert faults(folder) == f"{CHECKSUMS} is missing"


def test_a_file_more_counts_when_strict(folder):
    (folder / "state" / ".DS_Store").write_bytes(b"")
    assert verify_checksums(folder, strict=False) is None
    assert verify_checksums(folder, strict=True) == f"state/.DS_Store is not listed in {CHECKSUMS}"


def test_writers_at_once_and_killed_ones_do_not_matter(folder):
    (folder / f"{CHECKSUMS}.123.tmp").write_bytes(b"half")
    write_checksums(folder)
    assert faults(folder) is None


def test_others_may_read_it(folder):
    assert (folder / CHECKSUMS).stat().st_mode == (folder / "a").stat().st_mode
