"""A user without a home directory, as in containers that run under any number."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from cnn.data.sources import load_dataset
from cnn.runtime.disk import cache_directory


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"cnn-{os.getuid()}"


def test_data_are_prepared_and_kept_among_the_temporary_files(homeless):
    assert len(load_dataset("digits").train) == 1437
    assert {path.name for path in homeless.iterdir()} == {"decoded", "prepared"}
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert not Path("~").exists()


def test_a_folder_that_others_can_write_is_not_trusted(homeless):
    homeless.mkdir()
    homeless.chmod(0o777)
    with pytest.raises(PermissionError, match="should be yours alone"):
        cache_directory()
    homeless.rmdir()
    homeless.symlink_to("/etc")
    with pytest.raises(PermissionError, match="should be yours alone"):
        cache_directory()
