"""TFDS builders that prepare their dataset without TensorFlow.

Each builder subclasses the stock one and keeps its name, version, features, archive and checksum.
Only the reading of the archive is replaced, because the stock builders use TensorFlow for it.
Examples have the stock builders' keys and therefore their order, so the prepared files are
interchangeable.

This module imports tensorflow_datasets, which takes half a second: import it inside functions.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.image_classification import cifar, mnist

# Any: TFDS is only partly typed, and the methods below have other signatures than the stock ones.
_StockCifar10: Any = cifar.Cifar10
_StockCifar100: Any = cifar.Cifar100
_StockMnist: Any = mnist.MNIST
_StockFashionMnist: Any = mnist.FashionMNIST
_Builder: Any = tfds.core.GeneratorBasedBuilder

Examples = Iterator[tuple[int, dict[str, Any]]]


class _Cifar:
    """Reads CIFAR archives: each record holds the label bytes, then the R, G and B planes."""

    name: str
    info: Any
    _cifar_info: Any

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        meta = self._cifar_info
        with tarfile.open(dl_manager.download(meta.url)) as archive:

            def read(file: str) -> bytes:
                member = archive.extractfile(meta.prefix + file)
                assert member is not None, file
                return member.read()

            for key, file in zip(meta.label_keys, meta.label_files, strict=True):
                self.info.features[key].names = read(file).decode().split()
            train = b"".join(map(read, meta.train_files))
            test = b"".join(map(read, meta.test_files))
        return {
            "train": self._generate_examples("train_", train),
            "test": self._generate_examples("test_", test),
        }

    def _generate_examples(self, prefix: str, data: bytes) -> Examples:
        keys = self._cifar_info.label_keys
        records = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
        for index, record in enumerate(records):
            labels, planes = record[: len(keys)], record[len(keys) :].reshape(3, 32, 32)
            image = PIL.Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
            example = dict(zip(keys, labels.tolist(), strict=True))
            yield index, {**example, "id": f"{prefix}{index:05d}", "image": image}


class _Mnist:
    """Reads MNIST's idx files: a header of 16 bytes (images) or 8 (labels), then the values."""

    URL: str

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        files = {f"{s} {k}": f"{s}-{k}-ubyte.gz" for s in ("train", "t10k") for k in _IDX_HEADER}
        paths = dl_manager.download({key: self.URL + file for key, file in files.items()})
        data = {key: gzip.decompress(path.read_bytes()) for key, path in paths.items()}
        return {
            split: self._generate_examples(
                *(data[f"{source} {k}"][n:] for k, n in _IDX_HEADER.items())
            )
            for split, source in (("train", "train"), ("test", "t10k"))
        }

    def _generate_examples(self, images: bytes, labels: bytes) -> Examples:
        pixels = np.frombuffer(images, np.uint8).reshape(-1, 28, 28)
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield index, {"image": PIL.Image.fromarray(image), "label": label}


_IDX_HEADER = {"images-idx3": 16, "labels-idx1": 8}

with registered.skip_registration():  # these names are registered for the stock builders

    class Cifar10(_Cifar, _StockCifar10):
        """CIFAR-10."""

        url_infos = _StockCifar10.url_infos

    class Cifar100(_Cifar, _StockCifar100):
        """CIFAR-100; its label is the fine one."""

        url_infos = _StockCifar100.url_infos

    class MNIST(_Mnist, _StockMnist):
        """MNIST."""

        url_infos = _StockMnist.url_infos

    class FashionMNIST(_Mnist, _StockFashionMnist):
        """Fashion-MNIST."""

        url_infos = _StockFashionMnist.url_infos

    class Digits(_Builder):
        """The 1,797 handwritten 8x8 digits that ship inside scikit-learn."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=(
                    "1,797 handwritten digits, 8x8 pixels, 16 grey levels scaled to 0..255; "
                    "1,437 to train and 360 to test, each fifth of every class (see the builder)."
                ),
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(8, 8, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
            del dl_manager  # nothing to download
            from sklearn.datasets import load_digits

            digits: Any = load_digits()
            images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
            # Shuffle (NumPy promises never to change this random stream), sort by class and put
            # every fifth image into the test split: both splits have the same mix of classes.
            order = np.random.RandomState(0).permutation(len(images))
            order = order[np.argsort(digits.target[order], kind="stable")]
            is_test = np.arange(len(order)) % 5 == 0
            return {
                "train": self._generate_examples(images, digits.target, order[~is_test]),
                "test": self._generate_examples(images, digits.target, order[is_test]),
            }

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray
        ) -> Examples:
            for index in chosen.tolist():
                image = PIL.Image.fromarray(images[index])
                yield index, {"image": image, "label": int(labels[index])}


BUILDERS: dict[str, Any] = {
    builder.name: builder for builder in (Cifar10, Cifar100, MNIST, FashionMNIST, Digits)
}
