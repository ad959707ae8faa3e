"""The network: absent, silent, lying, or well; and archives put in place by hand."""

import socket
import time

import pytest

from cnn.data import load_dataset
from cnn.errors import UserError

ARCHIVE = "cifar-10-binary.tar.gz"


def one_line(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_names_the_ways_out(message, data_dir, url):
    for part in (
        f"{url}/{ARCHIVE}",
        str(data_dir / "downloads" / "manual" / ARCHIVE),
        "TFDS_DATA_DIR",
        "--config configs/digits.py",
    ):
        assert part in message


@pytest.fixture
def archive(cifar10, web, register_at):
    """The small CIFAR-10, registered at the local server (which does not serve it yet)."""
    content, _ = cifar10
    register_at("Cifar10", {ARCHIVE: content}, base=web.url)
    return content


def test_download(data_dir, archive, web, capsys, monkeypatch):
    monkeypatch.setattr("cnn.runtime.screen._PATIENCE", 0.0)
    web.files[ARCHIVE] = archive
    assert len(load_dataset("cifar10").train) == 60
    assert web.requests == [f"/{ARCHIVE}"]
    assert ARCHIVE in capsys.readouterr().err  # says what took a while
    load_dataset("cifar10")
    assert len(web.requests) == 1
    leftovers = [p for p in data_dir.rglob("*") if "tmp" in p.name or "incomplete" in p.name]
    assert not leftovers


def test_download_of_several_files(data_dir, web, register_at, idx, as_set):
    files, splits = idx
    register_at("MNIST", files, base=web.url)
    web.files.update(files)
    data = load_dataset("mnist")
    assert as_set(data.test.images, data.test.labels) == as_set(*splits["test"])
    assert len(web.requests) == 4


@pytest.mark.parametrize("fault", ["error page", "truncated", "longer"])
def test_wrong_file_is_refused_and_not_kept(fault, data_dir, archive, web):
    web.files[ARCHIVE] = {
        "error page": b"<html>Service unavailable</html>",
        "truncated": archive[:-100],
        "longer": archive + b"x",
    }[fault]
    message = one_line(load_dataset, "cifar10")
    assert "sha256" in message
    assert_names_the_ways_out(message, data_dir, web.url)
    assert not [path for path in data_dir.rglob("*") if path.is_file()]
    web.files[ARCHIVE] = archive  # the server recovers
    assert len(load_dataset("cifar10").test) == 20


def test_connection_that_breaks_off(data_dir, archive, web):
    web.files[ARCHIVE] = archive[:1000]
    web.withheld = len(archive) - 1000  # promised by Content-Length, never sent
    message = one_line(load_dataset, "cifar10")
    assert "broke off" in message
    assert_names_the_ways_out(message, data_dir, web.url)
    assert not [path for path in data_dir.rglob("*") if path.is_file()]


def test_page_not_found(data_dir, archive, web):
    message = one_line(load_dataset, "cifar10")
    assert "HTTP 404" in message
    assert_names_the_ways_out(message, data_dir, web.url)


def assert_gives_up_in_time(data_dir, url):
    start = time.monotonic()
    message = one_line(load_dataset, "cifar10")
    assert time.monotonic() - start < 10
    assert_names_the_ways_out(message, data_dir, url)
    assert not data_dir.exists()


def test_refused_connection(data_dir, cifar10, register_at):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"  # closed again, so refused
    register_at("Cifar10", {ARCHIVE: cifar10[0]}, base=url)
    assert_gives_up_in_time(data_dir, url)


def test_silent_connection(data_dir, cifar10, register_at, silent_server):
    register_at("Cifar10", {ARCHIVE: cifar10[0]}, base=silent_server)
    assert_gives_up_in_time(data_dir, silent_server)


def test_stock_builders_are_checked_for_a_network_too(data_dir, monkeypatch, by_hand):
    """Without the check, TFDS would try for minutes."""
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.image_classification import mnist

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/archive.zip"
    monkeypatch.setattr(mnist.KMNIST, "url_infos", {url: UrlInfo(1, "0" * 64, "archive.zip")})
    start = time.monotonic()
    message = one_line(load_dataset, "kmnist")
    assert time.monotonic() - start < 10
    assert url in message
    assert str(data_dir / "downloads" / "manual" / "archive.zip") in message

    def judge(self, **options):
        raise ValueError("judged by TFDS")

    monkeypatch.setattr(mnist.KMNIST, "download_and_prepare", judge)
    by_hand({"archive.zip": b"."})  # nothing to reach any more
    assert "judged by TFDS" in one_line(load_dataset, "kmnist")


def test_bad_archive_placed_by_hand_is_named_and_left_alone(data_dir, archive, web, by_hand):
    web.files[ARCHIVE] = archive
    by_hand({ARCHIVE: archive[:500]})
    place = data_dir / "downloads" / "manual" / ARCHIVE
    message = one_line(load_dataset, "cifar10")
    assert str(place) in message
    assert "sha256" in message
    assert place.read_bytes() == archive[:500]
    assert not web.requests
    assert not (data_dir / "cifar10").exists()


def test_archive_that_tfds_downloaded_is_used(data_dir, archive, web):
    """The archive of somebody who prepared tfrecord files with stock TFDS is not fetched again."""
    import tensorflow_datasets as tfds

    from cnn.data import builders

    web.files[ARCHIVE] = archive
    manager = tfds.download.DownloadManager(
        download_dir=data_dir / "downloads",
        dataset_name="cifar10",
        url_infos=builders.Cifar10.url_infos,
    )
    manager.download(f"{web.url}/{ARCHIVE}")
    assert len(web.requests) == 1
    assert len(load_dataset("cifar10").test) == 20
    assert len(web.requests) == 1


def test_registered_checksums_are_those_of_stock_tfds():
    from cnn.data.builders import BUILDERS

    (info,) = BUILDERS["cifar10"].url_infos.values()
    assert info.size == 170_052_171
    assert info.checksum.startswith(
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    )
    for name, number in (("cifar100", 1), ("mnist", 4), ("fashion_mnist", 4)):
        infos = BUILDERS[name].url_infos
        assert len(infos) == number
        assert all(url.endswith(info.filename) for url, info in infos.items())
