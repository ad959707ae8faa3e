"""Which paths are taken, and what is said of others."""

from pathlib import Path

import pytest

import cnn
from cnn.runtime.disk import resolve_path
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
        lambda: plot_curves([], given, title=""),
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
