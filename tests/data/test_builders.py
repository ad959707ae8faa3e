"""What our builders prepare is what the stock ones would: stock TFDS reads it, pixel by pixel."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cnn.data import load_dataset
from cnn.errors import UserError


def stock(name, split, data_dir):
    source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    return [example["image"] for example in source], [example["label"] for example in source]


def test_cifar10_round_trip(data_dir, cifar10, by_hand, as_set):
    archive, splits = cifar10
    by_hand({"cifar-10-binary.tar.gz": archive})
    data = load_dataset("cifar10")
    assert (data_dir / "cifar10" / "3.0.2" / "dataset_info.json").is_file()
    assert data.class_names[:2] == ("airplane", "automobile")
    assert data.image_shape == (32, 32, 3)
    for split, ours in (("train", data.train), ("test", data.test)):
        assert as_set(ours.images, ours.labels) == as_set(*splits[split])
        images, labels = stock("cifar10", split, data_dir)
        np.testing.assert_array_equal(images, ours.images)
        np.testing.assert_array_equal(labels, ours.labels)


def test_cifar10_examples_are_numbered_as_by_the_stock_builder(data_dir, cifar10, by_hand):
    archive, splits = cifar10
    by_hand({"cifar-10-binary.tar.gz": archive})
    load_dataset("cifar10")
    for example in tfds.data_source("cifar10", split="train", data_dir=data_dir, download=False):
        index = int(example["id"].decode().removeprefix("train_"))
        assert example["id"].decode() == f"train_{index:05d}"
        np.testing.assert_array_equal(example["image"], splits["train"][0][index])


def test_cifar100_round_trip(data_dir, cifar100, by_hand, as_set):
    archive, splits = cifar100
    by_hand({"cifar-100-binary.tar.gz": archive})
    data = load_dataset("cifar100")
    assert data.num_classes == 100
    assert data.class_names[7] == "fine_7"
    images, labels = splits["train"]
    assert as_set(data.train.images, data.train.labels) == as_set(images, labels[:, 1])
    source = tfds.data_source("cifar100", split="test", data_dir=data_dir, download=False)
    coarse = [example["coarse_label"] for example in source]
    assert sorted(coarse) == sorted(splits["test"][1][:, 0])


@pytest.mark.parametrize(
    ("name", "builder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_round_trip(name, builder, data_dir, idx, register_at, by_hand, as_set):
    files, splits = idx
    register_at(builder, files)
    by_hand(files)
    data = load_dataset(name)
    assert data.image_shape == (28, 28, 1)
    assert data.num_classes == 10
    for split, ours in (("train", data.train), ("test", data.test)):
        assert as_set(ours.images, ours.labels) == as_set(*splits[split])
        images, labels = stock(name, split, data_dir)
        np.testing.assert_array_equal(images, ours.images)
        np.testing.assert_array_equal(labels, ours.labels)


def test_we_read_what_the_stock_class_wrote(data_dir, as_set):
    """The stock writer with the stock class's own metadata; only the examples are given to it."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 28, 28, 1), np.uint8), np.arange(9)
    import PIL.Image

    def examples(dl_manager):
        pairs = list(zip(images, labels, strict=True))
        rows = [
            (i, {"image": PIL.Image.fromarray(x[..., 0]), "label": y})
            for i, (x, y) in enumerate(pairs)
        ]
        return {"train": iter(rows), "test": iter(rows)}

    builder = tfds.builder("mnist", data_dir=data_dir)
    builder._split_generators = examples
    builder.download_and_prepare(file_format="array_record")
    data = load_dataset("mnist")
    assert as_set(data.train.images, data.train.labels) == as_set(images, labels)


def test_digits(data_dir):
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    assert len(data.train) == 1437
    assert len(data.test) == 360
    assert data.image_shape == (8, 8, 1)
    assert data.class_names == tuple("0123456789")
    everything = np.concatenate([data.train.images, data.test.images])[..., 0]
    assert everything.max() == 255
    sixteenths = np.rint(everything / 255 * 16)
    original = load_digits().images
    key = [image.tobytes() for image in sixteenths.astype(np.float64)]
    assert sorted(key) == sorted(image.tobytes() for image in original)
    for split in (data.train, data.test):  # a fifth of each class, to within one image
        share = np.bincount(split.labels) / np.bincount(load_digits().target)
        np.testing.assert_allclose(share, len(split) / 1797, atol=1 / 170)
    # The split is part of the dataset's version: results are comparable only while this holds.
    assert data.fingerprint == "9d1181cfd3bfa574c2c0cb0016e4e04561671cb157aee5b754dadcd506005be1"
    assert (data_dir / "digits" / "1.0.0" / "dataset_info.json").is_file()


def test_tensorflow_is_not_needed_and_not_touched(data_dir, cifar10, by_hand, tmp_path):
    """In a fresh interpreter where importing tensorflow is fatal and every warning an error."""
    archive, _ = cifar10
    by_hand({"cifar-10-binary.tar.gz": archive})
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "tensorflow.py").write_text("import os; os._exit(33)")
    digest = hashlib.sha256(archive).hexdigest()
    script = (
        f"import sys; sys.path.insert(0, {str(poison)!r})\n"
        "from cnn.data import builders, load_dataset\n"
        "from tensorflow_datasets.core.download.checksums import UrlInfo\n"
        "url, = builders.Cifar10.url_infos\n"
        f"info = UrlInfo({len(archive)}, {digest!r}, 'cifar-10-binary.tar.gz')\n"
        "builders.Cifar10.url_infos = {url: info}\n"
        "for name in ('cifar10', 'digits', 'cifar10'):\n"
        "    print(name, len(load_dataset(name).train))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:3] == ["cifar10 60", "digits 1437", "cifar10 60"]


def test_import_is_cheap():
    script = (
        "import sys, cnn.data\n"
        "heavy = {'tensorflow_datasets', 'sklearn', 'tensorflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_unknown_version_and_config(data_dir):
    for name, hint in (("cifar10:1.0.0", "3.0.2"), ("cifar10/odd", "odd")):
        with pytest.raises(UserError, match=hint) as error:
            load_dataset(name)
        assert "\n" not in str(error.value)
    assert not data_dir.exists()
