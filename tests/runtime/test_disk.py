"""Paths that are accepted, files that are replaced atomically, and disks that cannot sync."""

import errno
import os
import stat
from pathlib import Path

import pytest

import cnn
from cnn.runtime.disk import atomic_write, resolve_path, sync
from cnn.runtime.plots import plot_curves

ADDRESSES = ["s3://b/r", "gs://b", "file:///tmp/r", "hdfs://h:1/r", "https://x/y", "S3+x.y-z://b"]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("kind", [str, Path, str.encode])
def test_an_address_is_no_folder(address, kind, tmp_path, monkeypatch):
    """Also once pathlib has made one slash of the two."""
    monkeypatch.chdir(tmp_path)
    config = cnn.load_config(Path(__file__).parents[2] / "configs" / "digits.py")
    given = kind(address)
    for take in (
        lambda: cnn.CheckpointManager(given),
        lambda: cnn.load_dataset("digits", given),
        lambda: cnn.load_config(given),
        lambda: cnn.train_and_evaluate(config, given),
        lambda: plot_curves([[]], given, title=""),
    ):
        with pytest.raises(cnn.UserError, match="is an address, not a path of this machine"):
            take()
    for variable in ("TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, address)
            with pytest.raises(cnn.UserError, match="is an address, not a path of this machine"):
                cnn.load_dataset("digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["x://b", "git_x://b", "1s3://b", " s3://b", "é://b"])
def test_whatever_stands_before_two_slashes_is_a_scheme(address):
    with pytest.raises(cnn.UserError, match="is an address"):
        resolve_path(address)


def test_local_paths_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr:0.1/x", "a/s3:/b", "./s3:/b", ":/x", "c:/x", "12:/x"):
        assert resolve_path(name) == tmp_path / name
    assert resolve_path(tmp_path / "s3:" / "b") == tmp_path / "s3:" / "b"


@pytest.mark.parametrize("bad", ["", "a\0b", 3, None, ["a"]])
def test_no_paths(bad):
    with pytest.raises(cnn.UserError, match="path"):
        cnn.CheckpointManager(bad)


def test_a_new_file_or_the_old_one(tmp_path):
    target = tmp_path / "a[b]"
    target.write_text("old")

    def write(text, error):
        with atomic_write(target) as stream:
            stream.write(text)
            if error:
                raise error

    with pytest.raises(KeyError):
        write(b"half", KeyError())
    assert target.read_text() == "old"
    write(b"new", None)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
    other = tmp_path / "other"
    other.touch()
    assert target.stat().st_mode == other.stat().st_mode
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "file"):
        pass
    assert not (tmp_path / "none").exists()


@pytest.fixture
def refuse(monkeypatch):
    """Lets a function of `os` fail with an error for what a test accepts."""

    def patch(name, number, concerns):
        original = getattr(os, name)

        def call(what, *args, **kwargs):
            if concerns(what):
                raise OSError(number, os.strerror(number))
            return original(what, *args, **kwargs)

        monkeypatch.setattr(os, name, call)

    return patch


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


@pytest.mark.parametrize(
    "number",
    [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EISDIR],
)
def test_folders_that_cannot_be_synced(tmp_path, refuse, number):
    refuse("fsync", number, is_folder)
    sync(tmp_path)
    with atomic_write(tmp_path / "file") as stream:
        stream.write(b"1")
    assert (tmp_path / "file").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.EINVAL, errno.EPERM])
def test_folders_that_cannot_be_opened(tmp_path, refuse, number):
    refuse("open", number, lambda path: path == tmp_path)
    sync(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(tmp_path, refuse, number):
    (tmp_path / "file").touch()
    refuse("fsync", number, lambda handle: True)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match=os.strerror(number)) as error:
            sync(path)
        assert error.value.filename == str(path)
