"""Datasets built from a researcher's own arrays are checked and described."""

import numpy as np
import pytest

from cnn.data import Dataset, Split
from cnn.errors import UserError


def split(number=6, shape=(4, 5, 3), seed=0, classes=3):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, *shape), np.uint8)
    return Split(images, np.arange(number, dtype=np.int32) % classes)


NAMES = ("a", "b", "c")


def test_from_splits():
    train, test = split(3000), split(4, seed=1)
    data = Dataset.from_splits("mine", train=train, test=test, class_names=NAMES)
    assert data.num_classes == 3
    assert data.image_shape == (4, 5, 3)
    pixels = train.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std(0), rtol=1e-6)
    assert data.mean.dtype == data.std.dtype == np.float32


def test_statistics_are_exact():
    """Three pixels of 0 and one of 255: mean 1/4, variance 3/16, whatever the order."""
    images = np.zeros((1, 2, 2, 1), np.uint8)
    images[0, 1, 1] = 255
    one = Split(images, np.zeros(1, np.int32))
    data = Dataset.from_splits("x", train=one, test=one, class_names=("a",))
    assert data.mean == np.float32(0.25)
    assert data.std == np.float32(np.sqrt(3 / 16))


def test_fingerprint_is_of_the_content():
    def of(train, test):
        return Dataset.from_splits("x", train=train, test=test, class_names=NAMES).fingerprint

    a, b = split(), split(seed=1)
    assert of(a, b) == of(split(), split(seed=1))
    strided = Split(np.repeat(a.images, 2, axis=0)[::2], a.labels)
    assert of(strided, b) == of(a, b)
    other = a.images.copy()
    other[3, 1, 1, 1] ^= 1
    relabelled = Split(a.images, a.labels[::-1].copy())
    different = [of(b, a), of(Split(other, a.labels), b), of(relabelled, b), of(a, a)]
    assert len({of(a, b), *different}) == 5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int32), "uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), r"\[N, H, W, C\]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), "int32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int32), "labels"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "2 images but 3 labels"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32), "empty"),
        ([[1]], np.zeros(1, np.int32), "list"),
    ],
)
def test_bad_split(images, labels, message):
    with pytest.raises(UserError, match=message):
        Split(images, labels)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a",), "2 images but 1 path: give one path per image"),
        (["a", "b"], "paths must be a tuple of text, not list"),
        ((b"a", b"b"), "paths must be a tuple of text"),
        ("ab", "paths must be a tuple of text, not str"),
    ],
)
def test_bad_paths(paths, message):
    with pytest.raises(UserError, match=message):
        Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), paths)


def test_paths_are_not_part_of_the_fingerprint():
    plain, named = split(2), Split(split(2).images, split(2).labels, ("a", "b"))
    data = [Dataset.from_splits("x", train=s, test=s, class_names=NAMES) for s in (plain, named)]
    assert data[0].fingerprint == data[1].fingerprint


def test_repr_is_short():
    many = tuple(f"class {i}" for i in range(1000))
    data = Dataset.from_splits("mine", train=split(600), test=split(), class_names=many)
    assert repr(data) == (
        "Dataset('mine', 600 train and 6 test images of 4x5x3, 1,000 classes: 'class 0', "
        "'class 1', 'class 2', 'class 3', 'class 4', ...)"
    )
    assert repr(split()) == "Split(images uint8[6, 4, 5, 3], labels 0..2)"
    named = Split(split(2).images, split(2).labels, ("a/1.png", "b"))
    assert repr(named) == "Split(images uint8[2, 4, 5, 3], labels 0..1, paths 'a/1.png' ...)"


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("which", ["train", "test"])
def test_labels_out_of_range(which, label):
    splits = {"train": split(), "test": split(seed=1)}
    splits[which].labels[2] = label
    with pytest.raises(UserError, match=rf"mine: labels of the {which} split .* 0\.\.2"):
        Dataset.from_splits("mine", **splits, class_names=NAMES)


def test_splits_of_different_shape():
    with pytest.raises(UserError, match=r"\(4, 5, 3\) but test images \(4, 5, 1\)"):
        Dataset.from_splits("x", train=split(), test=split(shape=(4, 5, 1)), class_names=NAMES)


@pytest.mark.parametrize(
    "bad", [np.zeros(2, np.float32), np.zeros(3), np.full(3, np.nan, np.float32)]
)
def test_bad_statistics(bad):
    good = np.ones(3, np.float32)
    with pytest.raises(UserError, match="mean"):
        Dataset("x", split(), split(), NAMES, mean=bad, std=good, fingerprint="0")
    with pytest.raises(UserError, match="std"):
        Dataset("x", split(), split(), NAMES, mean=good, std=bad, fingerprint="0")


@pytest.mark.parametrize("names", ["abc", None, ("a", 1, "c"), (b"a", b"b", b"c"), {"a", "b", "c"}])
def test_class_names_are_texts(names):
    with pytest.raises(UserError, match="mine: class_names must be a tuple of text"):
        Dataset.from_splits("mine", train=split(), test=split(seed=1), class_names=names)


def test_parts_of_other_types():
    with pytest.raises(UserError, match="mine: test must be a Split, not tuple"):
        Dataset.from_splits("mine", train=split(), test=(1, 2), class_names=NAMES)
    with pytest.raises(UserError, match="the name of a dataset must be text, not 3"):
        Dataset.from_splits(3, train=split(), test=split(), class_names=NAMES)
