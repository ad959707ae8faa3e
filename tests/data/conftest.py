"""Small archives in the real binary formats, and a machine without a past."""

import functools
import gzip
import hashlib
import http.server
import io
import shutil
import socket
import tarfile
import threading

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """An empty TFDS data directory, and a cache of its own."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture(scope="session")
def prepared_digits(tmp_path_factory):
    """A data directory with the digits prepared, made once."""
    from cnn.data import load_dataset

    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        load_dataset("digits", root / "tfds")
    return root / "tfds"


@pytest.fixture
def digits_dir(prepared_digits, data_dir):
    """As `data_dir`, with the digits prepared; nothing is decoded yet."""
    shutil.copytree(prepared_digits / "digits", data_dir / "digits")
    return data_dir / "digits" / "1.0.0"


def cifar_records(seed, number, num_labels):
    """(labels uint8[N, L], images uint8[N, 32, 32, 3], the records of the binary format)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, (number, num_labels), np.uint8)
    images = rng.integers(0, 256, (number, 32, 32, 3), np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(number, -1)
    return labels, images, np.concatenate([labels, planes], axis=1).tobytes()


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cifar10(monkeypatch):
    """A small CIFAR-10: its archive is registered in place of the real one.

    Returns (archive bytes, {split: (images, labels)}).
    """
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    files = {"batches.meta.txt": names.replace(" ", "\n").encode() + b"\n\n"}
    parts = []
    for number in range(1, 6):
        labels, images, files[f"data_batch_{number}.bin"] = cifar_records(number, 12, 1)
        parts.append((images, labels[:, 0]))
    labels, images, files["test_batch.bin"] = cifar_records(6, 20, 1)
    archive = tar_gz({f"cifar-10-batches-bin/{name}": data for name, data in files.items()})
    register(monkeypatch, "Cifar10", {"cifar-10-binary.tar.gz": archive})
    train = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    return archive, {"train": train, "test": (images, labels[:, 0])}


@pytest.fixture
def cifar100(monkeypatch):
    """As `cifar10`; labels are uint8[N, 2], coarse and fine."""
    files, splits = {}, {}
    for split, seed in (("train", 1), ("test", 2)):
        labels, images, files[f"{split}.bin"] = cifar_records(seed, 30, 2)
        splits[split] = (images, labels)
    files["coarse_label_names.txt"] = "\n".join(f"coarse_{i}" for i in range(20)).encode()
    files["fine_label_names.txt"] = "\n".join(f"fine_{i}" for i in range(100)).encode()
    archive = tar_gz({f"cifar-100-binary/{name}": data for name, data in files.items()})
    register(monkeypatch, "Cifar100", {"cifar-100-binary.tar.gz": archive})
    return archive, splits


def idx_files():
    """({file name: gzip bytes}, {split: (images, labels)}) in MNIST's format."""
    files, splits = {}, {}
    for split, source, seed in (("train", "train", 1), ("test", "t10k", 2)):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (25, 28, 28, 1), np.uint8)
        labels = rng.integers(0, 10, 25, np.uint8)
        files[f"{source}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + images.tobytes())
        files[f"{source}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + labels.tobytes())
        splits[split] = (images, labels)
    return files, splits


def register(monkeypatch, builder, files, base=None):
    """Registers the checksums of `files` in place of the real ones, at the URLs of the builder."""
    from tensorflow_datasets.core.download.checksums import UrlInfo

    from cnn.data import builders

    cls = getattr(builders, builder)
    infos = {}
    for url in cls.url_infos:
        name = url.rsplit("/", 1)[1]
        infos[f"{base}/{name}" if base else url] = UrlInfo(
            size=len(files[name]),
            checksum=hashlib.sha256(files[name]).hexdigest(),
            filename=name,
        )
    monkeypatch.setattr(cls, "url_infos", infos)
    if base and hasattr(cls, "_cifar_info"):
        stock = cls._cifar_info.fget
        url = next(iter(infos))
        monkeypatch.setattr(
            cls, "_cifar_info", property(lambda self: stock(self)._replace(url=url))
        )
    elif base:
        monkeypatch.setattr(cls, "URL", f"{base}/")


def place(data_dir, **files):
    """Puts archives where a person would."""
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def by_hand(data_dir):
    return lambda files: place(data_dir, **files)


@pytest.fixture
def register_at(monkeypatch):
    return functools.partial(register, monkeypatch)


@pytest.fixture
def web():
    """Serves {path: bytes} on the loopback; .url is its address, .requests what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.requests.append(self.path)
            content = web.files.get(self.path.lstrip("/"))
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"") + web.withheld))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.requests, web.withheld = {}, [], 0
    web.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield web
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture
def silent_server():
    """An address that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def idx():
    return idx_files()


def as_set(images, labels):
    """Examples without their order: TFDS shuffles as it writes."""
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.fixture(name="as_set")
def _as_set():
    return as_set
