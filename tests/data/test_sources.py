"""Where datasets are looked for, which can be read, and what is said of the others."""

import errno
import json
import os
import re
import shutil
import struct
import time
import types
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from cnn.data import load_dataset
from cnn.errors import UserError
from cnn.runtime.checksums import CHECKSUMS

DIGITS = "9d1181cfd3bfa574c2c0cb0016e4e04561671cb157aee5b754dadcd506005be1"


def message_of(name, data_dir=None):
    with pytest.raises(UserError) as error:
        load_dataset(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


class OwnImages(tfds.core.GeneratorBasedBuilder):
    """A registered builder such as a researcher writes; the class attributes are its content."""

    VERSION = tfds.core.Version("1.2.0")
    splits = ("train", "validation")
    sizes = ((4, 6),)
    mode = "RGB"
    classes = 3
    names = None
    late_names = None  # known only once the archive is read
    labels = (0, 1, 2)

    def _info(self):
        channels = len(PIL.Image.new(self.mode, (1, 1)).getbands())
        features = {
            "image": tfds.features.Image(shape=(None, None, channels)),
            "label": tfds.features.ClassLabel(names=self.names)
            if self.names
            else tfds.features.ClassLabel(num_classes=self.classes),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        if self.late_names:
            self.info.features["label"].names = self.late_names
        return {split: self._generate_examples() for split in self.splits}

    def _generate_examples(self):
        for i in range(12):
            image = PIL.Image.new(self.mode, self.sizes[i % len(self.sizes)][::-1], i)
            yield i, {"image": image, "label": self.labels[i % len(self.labels)]}


def test_any_builder_that_needs_no_tensorflow(data_dir):
    data = load_dataset("own_images")
    assert data.name == "own_images"
    assert data.train.images.shape == (12, 4, 6, 3)
    assert data.class_names == ("0", "1", "2")
    assert (data_dir / "own_images" / "1.2.0").is_dir()


def test_images_of_several_sizes(data_dir, monkeypatch):
    monkeypatch.setattr(OwnImages, "sizes", ((4, 6), (5, 6)))
    message = message_of("own_images")
    assert "(4, 6, 3)" in message
    assert "(5, 6, 3)" in message


def png_that_declares(side):
    """A small file that says it is a large image."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of one and refuses the other
def test_decompression_bombs(side, data_dir, monkeypatch):
    def generate(self):
        yield 0, {"image": png_that_declares(side), "label": 0}

    monkeypatch.setattr(OwnImages, "_generate_examples", generate)
    message = message_of("own_images")
    assert message.startswith("own_images has an image that Pillow takes for a decompression bomb")
    assert f"({side**2} pixels)" in message


def test_labels_out_of_range(data_dir, monkeypatch):
    monkeypatch.setattr(OwnImages, "labels", (0, -1))  # TFDS writes -1 for "not labelled"
    assert "run from -1 to 0" in message_of("own_images")


@pytest.mark.parametrize("splits", [("a", "b"), ("test",)])
def test_splits_that_are_missing(splits, data_dir, monkeypatch):
    monkeypatch.setattr(OwnImages, "splits", splits)
    message = message_of("own_images")
    assert f"own_images has the splits {', '.join(splits)}: train is needed" in message
    for way_out in ("docs/datasets.md", "tfds.data_source", "cnn.Dataset.from_splits"):
        assert way_out in message


@pytest.mark.parametrize("splits", [("train",), ("train", "extra")])
def test_one_split_is_divided(splits, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(OwnImages, "splits", splits)
    data = load_dataset("own_images")
    assert np.bincount(data.train.labels).tolist() == [3, 3, 3]
    assert np.bincount(data.test.labels).tolist() == [1, 1, 1]
    note = "own_images has no test split: 3 of its train images are set aside"
    assert note in capsys.readouterr().err
    other = load_dataset("own_images", split_seed=1, test_fraction=0.5)
    assert len(other.test) == 6
    monkeypatch.setattr("cnn.data.sources._decode", None)  # each has its place in the cache
    assert load_dataset("own_images").fingerprint == data.fingerprint
    assert note in capsys.readouterr().err
    again = load_dataset("own_images", split_seed=1, test_fraction=0.5)
    assert again.fingerprint == other.fingerprint


def test_single_images_cannot_be_divided(data_dir, monkeypatch):
    monkeypatch.setattr(OwnImages, "splits", ("train",))
    monkeypatch.setattr(OwnImages, "classes", 12)
    monkeypatch.setattr(OwnImages, "labels", tuple(range(12)))
    assert "one image of each class" in message_of("own_images")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_of_several_sizes_are_resized(mode, data_dir, monkeypatch):
    monkeypatch.setattr(OwnImages, "sizes", ((4, 6), (5, 6)))
    monkeypatch.setattr(OwnImages, "mode", mode)
    message = message_of("own_images")
    for way in (" image_size=4 (", "--config.dataset.image_size=4 of", "--image-size 4 of"):
        assert way in message
    data = load_dataset("own_images", image_size=(3, 5), resize="stretch")
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    assert data.train.images.shape == (12, 3, 5, channels)
    assert np.ptp(data.train.images[3], axis=(0, 1)).max() == 0  # of one colour, as it was


def test_settings_without_effect_share_the_arrays(digits_dir, monkeypatch):
    expected = load_dataset("digits")
    monkeypatch.setattr("cnn.data.sources._decode", None)
    assert load_dataset("digits", image_size=0, resize="stretch").fingerprint == (
        expected.fingerprint
    )


def test_a_fraction_without_effect_is_named(digits_dir, capsys):
    load_dataset("digits")
    assert "warning" not in capsys.readouterr().err
    load_dataset("digits", test_fraction=0.5)
    assert "warning: digits has a test split; ignored: test_fraction=0.5\n" in (
        capsys.readouterr().err
    )


def test_a_set_of_one_size_is_resized_too(digits_dir):
    assert load_dataset("digits", image_size=6).train.images.shape == (1437, 6, 6, 1)
    assert load_dataset("digits", image_size=8).fingerprint == load_dataset("digits").fingerprint


def test_the_digits_are_what_they_always_were(digits_dir):
    """Runs on them resume only with these bits."""
    assert load_dataset("digits").fingerprint == DIGITS


BAD_NAMES = [
    ["a\nb", "c", "d"],
    ["a\nb", "c", ""],  # as many lines as classes once the empty one is left out
    ["", "b", "c"],
    [" a", "b", "c"],
    ["a", "b\t", "c"],
    ["a", "b\u00a0", "c"],
    ["a\rb", "c", "d"],
    ["a", "\ud800", "c"],
]


@pytest.mark.parametrize("names", BAD_NAMES)
@pytest.mark.parametrize("when", ["names", "late_names"])
def test_class_names_that_a_label_file_cannot_hold(names, when, data_dir, monkeypatch):
    """TFDS itself would give the classes behind such a name the names of others."""
    monkeypatch.setattr(OwnImages, when, names)
    assert "own_images: " in message_of("own_images")
    if when == "names":
        assert "without line breaks, and without blanks" in message_of("own_images")
        assert not list(data_dir.glob("own_images/*"))


def test_class_names_of_a_dataset_that_tfds_prepared(data_dir, monkeypatch):
    for names in BAD_NAMES[:-1]:
        monkeypatch.setattr(OwnImages, "names", names)
        builder = OwnImages(data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
        assert "label.labels.txt" in message_of("own_images")
        shutil.rmtree(data_dir)
    good = ["polar bear", "\u718a", 'a,b;"c"\x0b\u2028d']
    monkeypatch.setattr(OwnImages, "names", good)
    OwnImages(data_dir=data_dir).download_and_prepare(file_format="array_record")
    assert load_dataset("own_images").class_names == tuple(good)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["features.json", "digits-train*"])
def test_a_file_that_cannot_be_opened_is_no_damage(
    number, listed, name, digits_dir, monkeypatch, capsys
):
    if not listed:
        (digits_dir / CHECKSUMS).unlink()
    (file,) = digits_dir.glob(name)
    refuse(monkeypatch, file, number)
    message = message_of("digits")
    assert f"the prepared digits cannot be read: {file} ({os.strerror(number)})" in message
    assert "nothing was changed" in message
    assert "delete" not in message


def refuse(monkeypatch, file, number):
    def open_(path, *args, _open=open, **kwargs):
        if str(path) == str(file):
            raise OSError(number, os.strerror(number), str(path))
        return _open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", open_)


def test_a_folder_that_cannot_be_looked_into(digits_dir, monkeypatch):
    """It must not be taken for one in which nothing was prepared."""
    stat = os.stat

    def refused(path, *args, **kwargs):
        if str(path).endswith("dataset_info.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr("os.stat", refused)
    assert "Permission denied" in message_of("digits")


def test_builder_that_needs_tensorflow(data_dir, monkeypatch, capfd):
    def generate(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        yield 0, {"image": tf.zeros([1]), "label": 0}

    monkeypatch.setattr(OwnImages, "_generate_examples", generate)
    message = message_of("own_images")
    assert "pip install tensorflow" in message
    assert not (data_dir / "own_images" / "1.2.0").exists()
    assert not list(data_dir.rglob("*incomplete*"))
    assert "****" not in capfd.readouterr().out


def test_unknown_names(data_dir):
    assert "cifar10" in message_of("cifar01")
    assert "digits" in message_of("digts")
    assert "cifar10" in message_of("CIFAR10")
    assert "xyzzy" in message_of("xyzzy")
    assert not data_dir.exists()


@pytest.mark.parametrize(
    "name", ["", "../etc", "a b", "cifar10:newest", "cifar10:3", "/cifar10", None, 3, b"cifar10"]
)
def test_not_a_name(name, data_dir):
    assert repr(name) in message_of(name)


def as_tfrecord(prepared):
    """Makes it a directory such as stock TFDS with TensorFlow leaves (all but the records)."""
    (prepared / CHECKSUMS).unlink()
    info = json.loads((prepared / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    for file in prepared.glob("*array_record*"):
        file.rename(prepared / file.name.replace("array_record", "tfrecord"))


def test_tfrecord_without_tensorflow(digits_dir, monkeypatch):
    as_tfrecord(digits_dir)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = message_of("digits")
    assert str(digits_dir) in message
    assert "pip install tensorflow" in message
    assert "TFDS_DATA_DIR" in message


def test_tfrecord_with_tensorflow(digits_dir, monkeypatch):
    """The way through TensorFlow, with a stand-in for what TensorFlow would return."""
    expected = load_dataset("digits")
    as_tfrecord(digits_dir)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def as_dataset(self, *, split, read_config):
        assert read_config.interleave_cycle_length == 1  # or the files would be mixed
        part = getattr(expected, split)
        pairs = zip(part.images, part.labels, strict=True)
        return [{"image": image, "label": label} for image, label in pairs]

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    monkeypatch.setattr(tfds, "ReadConfig", types.SimpleNamespace)
    monkeypatch.setattr(tfds, "as_numpy", iter)
    assert load_dataset("digits").fingerprint == expected.fingerprint


def test_parquet(data_dir):
    OwnImages(data_dir=data_dir).download_and_prepare(file_format="parquet")
    message = message_of("own_images")
    assert f"{data_dir / 'own_images' / '1.2.0'} holds parquet files" in message
    assert "file_format='array_record'" in message
    assert "TFDS_DATA_DIR" in message


def test_damaged_records(digits_dir):
    file = next(digits_dir.glob("digits-train*"))
    file.write_bytes(file.read_bytes()[:1000])
    assert f"delete {digits_dir}" in message_of("digits")


def test_missing_records(digits_dir):
    next(digits_dir.glob("digits-train*")).unlink()
    assert f"delete {digits_dir}" in message_of("digits")


def test_data_dir_argument_wins_and_tilde_is_expanded(data_dir, tmp_path):
    load_dataset("digits", "~/data")
    assert (tmp_path / "home" / "data" / "digits" / "1.0.0").is_dir()
    assert not data_dir.exists()


def test_default_data_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    load_dataset("digits")
    assert (tmp_path / "home" / "tensorflow_datasets" / "digits").is_dir()


def test_newest_version_unless_one_is_named(data_dir, monkeypatch):
    load_dataset("own_images")
    folder = data_dir / "own_images"
    shutil.copytree(folder / "1.2.0", folder / "1.10.0")
    monkeypatch.setattr("cnn.data.prepare.prepare", None)  # nothing may be prepared
    seen = []
    monkeypatch.setattr("cnn.data.cache.load", lambda key, name: seen.append(key.source.name))
    load_dataset("own_images")
    load_dataset("own_images:1.2.0")
    assert seen[::2] == ["1.10.0", "1.2.0"]


@pytest.mark.parametrize("name", ["a[b]*?", "{SPLIT} %41#;,:", "back\\slash\n", "gs:"])
def test_any_path_holds_datasets_and_caches(name, prepared_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name / "cache"))
    shutil.copytree(prepared_digits, tmp_path / name / "tfds")
    first = load_dataset("digits", tmp_path / name / "tfds")
    assert len(list((tmp_path / name / "cache" / "cnn" / "decoded").iterdir())) == 1
    capsys.readouterr()
    assert load_dataset("digits", tmp_path / name / "tfds").fingerprint == first.fingerprint
    assert not capsys.readouterr().err
    (tmp_path / name / "tfds" / "digits").rename(tmp_path / "aside")
    again = load_dataset("digits", tmp_path / name / "tfds")  # prepared anew
    assert again.fingerprint == first.fingerprint


def test_a_data_dir_that_is_not_utf8(tmp_path):
    assert "is not UTF-8" in message_of("digits", tmp_path / os.fsdecode(b"\xff"))
    assert not list(tmp_path.iterdir())


def test_remote_data_dir(data_dir):
    assert "gs://bucket" in message_of("cifar10", "gs://bucket/tfds")


def read_only(monkeypatch, folder):
    """Root may write anywhere, so the operating system's refusal is imitated."""
    mkdir = os.mkdir

    def refuse(path, *args, **kwargs):
        if Path(path).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr("os.mkdir", refuse)


def test_read_only_data_dir_that_holds_the_dataset(digits_dir, data_dir, monkeypatch):
    before = sorted((path, path.stat().st_mtime_ns) for path in data_dir.rglob("*"))
    read_only(monkeypatch, data_dir)
    assert len(load_dataset("digits").train) == 1437
    assert sorted((path, path.stat().st_mtime_ns) for path in data_dir.rglob("*")) == before


def test_read_only_data_dir_without_the_dataset(data_dir, monkeypatch):
    data_dir.mkdir()
    read_only(monkeypatch, data_dir)
    message = message_of("cifar10")
    assert str(data_dir) in message
    assert "cannot be written" in message
    assert "TFDS_DATA_DIR" in message


@pytest.mark.parametrize("below", ["file/tfds", "file"])
def test_data_dir_at_or_below_a_file(below, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message_of("cifar10", tmp_path / below)


@pytest.mark.parametrize("kind", ["read-only", "below a file", "proc"])
def test_digits_work_everywhere(kind, tmp_path, data_dir, monkeypatch):
    (tmp_path / "file").write_text("")
    data_dir.mkdir()
    if kind == "read-only":
        read_only(monkeypatch, data_dir)
    root = {"read-only": data_dir, "below a file": tmp_path / "file" / "x", "proc": "/proc/nowhere"}
    assert len(load_dataset("digits", root[kind]).train) == 1437
    assert not list(data_dir.iterdir())
    assert len(load_dataset("digits", root[kind]).train) == 1437


def test_what_takes_a_while_is_reported_on_standard_error(data_dir, capfd, monkeypatch):
    monkeypatch.setattr("cnn.runtime.screen._PATIENCE", 0.001)
    load_dataset("digits")
    output = capfd.readouterr()
    assert output.out == ""
    assert "\r" not in output.err
    whats = [re.sub(r" \.\.\..*|: [\d.]+ s", "", line) for line in output.err.splitlines()]
    assert list(dict.fromkeys(whats)) == [
        f"preparing digits in {data_dir}/digits/1.0.0",
        "decoding digits train",
        "decoding digits test",
    ]


@pytest.mark.slow
def test_real_cifar10(real_cifar10):
    """Counts and statistics as published; then the mapped arrays in under a second."""
    data = load_dataset("cifar10", real_cifar10)
    assert len(data.train) == 50_000
    assert len(data.test) == 10_000
    np.testing.assert_allclose(data.mean, [0.49139968, 0.48215841, 0.44653091], rtol=1e-6)
    np.testing.assert_allclose(data.std, [0.24703223, 0.24348513, 0.26158784], rtol=1e-6)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    source = tfds.data_source("cifar10", split="test", data_dir=real_cifar10, download=False)
    for index in range(0, 10_000, 999):
        np.testing.assert_array_equal(source[index]["image"], data.test.images[index])
        assert source[index]["label"] == data.test.labels[index]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        again = load_dataset("cifar10", real_cifar10)
        times.append(time.perf_counter() - start)
    assert again.fingerprint == data.fingerprint
    assert min(times) < 1


def test_a_config_of_a_dataset_that_has_none(data_dir):
    assert "digits has no configs" in message_of("digits/large", data_dir)
