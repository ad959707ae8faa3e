"""Files that are replaced as a whole, and disks that cannot sync."""

import errno
import os
import stat

import pytest

from cnn.runtime.files import replacing, sync


def test_a_new_file_or_the_old_one(tmp_path):
    target = tmp_path / "a[b]"
    target.write_text("old")

    def write(text, error):
        with replacing(target) as stream:
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
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "file"):
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
    with replacing(tmp_path / "file") as stream:
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
