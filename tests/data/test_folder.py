"""Pictures in a folder per class: layouts, the split, the cache, and what is refused."""

import errno
import json
import os

import numpy as np
import PIL.Image
import pytest

import cnn
from cnn.data import folder as folder_module
from cnn.data import load_folder
from cnn.errors import UserError
from tests.helpers import short_config

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


def draw(path, colour=(1, 2, 3), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path)


def make(root, number=12, classes=COLOURS):
    """Pictures that all differ: the red channel is changed by their number."""
    for name, (red, green, blue) in classes.items():
        for i in range(number):
            draw(root / name / f"{i:02d}.png", (red + i, green, blue))
    return root


@pytest.fixture
def photos(tmp_path):
    return make(tmp_path / "photos")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names = []
    real = folder_module.read_images

    def watched(sources, **options):
        names.extend(path.name for path in sources)
        return real(sources, **options)

    monkeypatch.setattr(folder_module, "read_images", watched)
    return names


def refusal(*arguments, **options):
    with pytest.raises(UserError) as error:
        load_folder(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def warnings_of(capsys):
    err = capsys.readouterr().err
    return [line for line in err.splitlines() if line.startswith("warning: ")]


def contents(split):
    """The first pixels, which tell the pictures apart, by class."""
    pixels = [tuple(pixel) for pixel in split.images[:, 0, 0].tolist()]
    return [{p for p, of in zip(pixels, split.labels, strict=True) if of == k} for k in range(3)]


def test_a_folder_per_class(photos, capsys):
    data = load_folder(photos)
    assert (data.name, data.class_names) == ("photos", ("ant", "bee", "cat"))
    assert data.train.images.shape == (30, 8, 8, 3)
    assert data.test.images.shape == (6, 8, 8, 3)
    for split in (data.train, data.test):
        assert not split.images.flags.writeable
        assert (split.images[:, 0, 0].argmax(-1) == split.labels).all()
        assert np.bincount(split.labels).tolist() == [len(split) // 3] * 3
        assert (np.diff(split.labels) >= 0).all()  # in the order of the paths
        for label in range(3):
            assert (np.diff(split.images[split.labels == label, 0, 0, 0].astype(int)) > 0).all()
    assert not warnings_of(capsys)


def test_the_split_follows_from_seed_and_names(photos):
    before = load_folder(photos)
    assert load_folder(photos, split_seed=1).fingerprint != before.fingerprint
    again = load_folder(photos, split_seed=0)
    assert again.fingerprint == before.fingerprint
    assert len(load_folder(photos, test_fraction=0.5).test) == 18
    for i in range(12, 15):  # a few more pictures move hardly any other
        draw(photos / "ant" / f"{i:02d}.png", (200 + i, 0, 0))
    after = load_folder(photos)
    test, test_before = contents(after.test), contents(before.test)
    assert test[1] == test_before[1]
    assert len(test_before[0] & test[0]) >= 1
    assert len(test[0]) == 3


def test_each_class_of_two_has_one_in_each_split(tmp_path, capsys):
    make(tmp_path / "photos", 2)
    draw(tmp_path / "photos" / "one" / "a.png")
    data = load_folder(tmp_path / "photos", test_fraction=0.01)
    assert np.bincount(data.train.labels).tolist() == [1, 1, 1, 1]
    assert np.bincount(data.test.labels, minlength=4).tolist() == [1, 1, 1, 0]
    (line,) = warnings_of(capsys)
    assert "classes with less than 10 images to train on: ant 1, bee 1, cat 1, one 1" in line


@pytest.mark.parametrize("tested", ["test", "val", "validation", "valid", "Test"])
def test_folders_for_training_and_testing(tested, tmp_path, capsys):
    make(tmp_path / "photos" / "train", 10)
    make(tmp_path / "photos" / tested, 3)
    data = load_folder(tmp_path / "photos")
    assert (len(data.train), len(data.test)) == (30, 9)
    assert not warnings_of(capsys)


def test_what_is_beside_them_is_noted(tmp_path, capsys):
    root = tmp_path / "photos"
    for part in ("train", "val", "test", "unlabelled"):
        make(root / part, 10)
    draw(root / "train" / "loose.png")
    assert len(load_folder(root).test) == 30
    lines = warnings_of(capsys)
    assert len(lines) == 3
    assert lines[0].endswith("photos/test is the test split; val is not used")
    assert "has unlabelled beside train, which is not used" in lines[1]
    assert "1 picture directly in" in lines[2]
    assert lines[2].endswith("photos/train, in the folder of no class, is left out")


def test_train_alone_is_divided(tmp_path):
    make(tmp_path / "photos" / "train")
    data = load_folder(tmp_path / "photos")
    assert (len(data.train), len(data.test)) == (30, 6)


def test_pictures_in_deeper_folders_and_links(photos, tmp_path, capsys):
    draw(photos / "ant" / "deep" / "er" / "x.png", (250, 0, 0))
    draw(tmp_path / "elsewhere" / "y.png", (251, 0, 0))
    (photos / "ant" / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "ant" / "loop").symlink_to(photos)
    (photos / "ant" / "self").symlink_to(photos / "ant")
    for ignored in (".hidden.png", ".cache/a.png", "__MACOSX/b.png", "Thumbs.db", "@eaDir/c.jpg"):
        draw(photos / "bee" / "new.png", (20, 200, 0))
        path = photos / "bee" / ignored
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((photos / "bee" / "new.png").read_bytes())
    (photos / ".git").mkdir()
    (photos / "__MACOSX").mkdir()
    (photos / "notes.txt").touch()
    for name in ("a.txt", "b.txt", "c.HEIC", "d"):
        (photos / "cat" / name).touch()
    (photos / "cat" / "E.PNG").write_bytes((photos / "cat" / "00.png").read_bytes())
    data = load_folder(photos)
    counts = np.bincount([*data.train.labels, *data.test.labels]).tolist()
    assert counts == [14, 13, 13]
    (line,) = warnings_of(capsys)
    assert "4 files in" in line
    assert line.endswith("are left out: 2 .txt, 1 .heic, 1 no extension")


def test_one_file_is_one(photos, capsys):
    (photos / "cat" / "a.txt").touch()
    (photos / "cat" / "bad.png").touch()
    load_folder(photos)
    first, second = warnings_of(capsys)
    assert first == (
        f"warning: 1 file in {photos} without the name of a picture is left out: 1 .txt"
    )
    assert second == (
        f"warning: 1 image (cat/bad.png: not an image) in {photos} cannot be read and is left out"
    )


def test_the_paths_of_the_images(photos, decoded):
    (photos / "ant" / "00a.png").write_bytes(b"no image")
    (photos / "bee" / "same.png").write_bytes((photos / "bee" / "03.png").read_bytes())
    made, mapped = load_folder(photos), load_folder(photos)
    assert len(decoded) == 38
    for data in (made, mapped):
        for split in (data.train, data.test):
            for path, image, label in zip(split.paths, split.images, split.labels, strict=True):
                with PIL.Image.open(photos / path) as picture:
                    np.testing.assert_array_equal(image, picture)
                assert path.startswith(data.class_names[label])
    draw(photos / "cat" / "00a.png", (1, 1, 1))
    assert "cat/00a.png" in (lambda d: d.train.paths + d.test.paths)(load_folder(photos))


def test_settings_without_effect_are_named(photos, tmp_path, capsys):
    make(tmp_path / "divided" / "train", 10)
    make(tmp_path / "divided" / "test", 2)
    load_folder(tmp_path / "divided")
    load_folder(photos, test_fraction=0.1, split_seed=1)
    assert not warnings_of(capsys)
    load_folder(tmp_path / "divided", test_fraction=0.5)
    load_folder(tmp_path / "divided", test_fraction=0.5, split_seed=1)
    assert warnings_of(capsys) == [
        f"warning: {tmp_path / 'divided'} has a test split; ignored: test_fraction=0.5",
        f"warning: {tmp_path / 'divided'} has a test split; ignored: test_fraction=0.5, "
        "split_seed=1",
    ]


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_unreadable_files_are_left_out_and_named(fraction, photos, capsys):
    expected = load_folder(photos, test_fraction=fraction)
    for i in range(7):
        (photos / "ant" / f"bad{i}.png").write_bytes(b"no image")
    (photos / "ant" / "bad0.png").rename(photos / "ant" / "bad\n0.png")
    (photos / "bee" / "gone.png").symlink_to(photos / "nowhere")
    capsys.readouterr()
    for _ in range(2):  # decoded, and from the cache
        data = load_folder(photos, test_fraction=fraction)
        assert data.fingerprint == expected.fingerprint
        line = warnings_of(capsys)[0]
        assert line.startswith("warning: 8 images (ant/bad\\n0.png: not an image; ")
        assert "; and 3 more) in " in line
    message = refusal(photos, test_fraction=fraction, on_unreadable="stop")
    assert "ant/bad1.png: not an image" in message
    for way in (" on_unreadable=skip (", "--config.dataset.on_unreadable=skip", "--on-unreadable"):
        assert way in message


def test_sizes(photos, capsys):
    draw(photos / "bee" / "large.png", (0, 255, 0), (20, 10))
    message = refusal(photos)
    assert "several sizes, such as 8x8 (ant/" in message
    assert "20x10 (bee/large.png)" in message
    for way in ("image_size=64 (", "--config.dataset.image_size=64 of train.py", "--image-size 64"):
        assert way in message
    assert load_folder(photos, image_size=(4, 6)).image_shape == (4, 6, 3)
    crop = load_folder(photos, image_size=4)
    assert crop.image_shape == (4, 4, 3)
    assert not warnings_of(capsys)


def test_a_second_start_decodes_nothing(photos, decoded):
    first = load_folder(photos)
    assert len(decoded) == 36
    second = load_folder(photos)
    assert len(decoded) == 36
    assert second.fingerprint == first.fingerprint
    for a, b in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    load_folder(photos, image_size=4)
    load_folder(photos, split_seed=3)
    decoded.clear()
    for options in ({}, {"image_size": 4}, {"split_seed": 3}):
        load_folder(photos, **options)  # none has replaced another
    assert not decoded


def test_only_new_content_is_decoded(photos, decoded):
    first = load_folder(photos)
    decoded.clear()
    os.utime(photos / "ant" / "00.png", (1, 1))  # touched
    assert load_folder(photos).fingerprint == first.fingerprint
    assert not decoded
    draw(photos / "ant" / "01.png", (255, 255, 255))  # changed
    changed = load_folder(photos)
    assert decoded == ["01.png"]
    assert changed.fingerprint != first.fingerprint
    decoded.clear()
    draw(photos / "cat" / "99.png", (9, 9, 99))  # added
    assert len(load_folder(photos).train) == 31 - (len(load_folder(photos).test) - 6)
    assert decoded == ["99.png"]
    decoded.clear()
    (photos / "cat" / "99.png").rename(photos / "cat" / "98.png")  # renamed
    (photos / "bee").rename(photos / "wasp")
    data = load_folder(photos)
    assert data.class_names == ("ant", "cat", "wasp")
    assert (data.train.images[data.train.labels == 2, 0, 0, 1] == 200).all()
    assert not decoded
    (photos / "cat" / "98.png").unlink()  # removed
    data = load_folder(photos)
    assert len(data.train) + len(data.test) == 36
    assert not decoded
    folder_module.cache.Key(photos, ("folder",)).folder.rename(photos.parent / "aside")
    assert load_folder(photos).fingerprint == data.fingerprint  # as if nothing had been known


def test_a_file_of_the_same_size_and_time_is_noticed(photos):
    first = load_folder(photos)
    path = photos / "ant" / "00.png"
    status, content = path.stat(), (photos / "ant" / "02.png").read_bytes()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_folder(photos).fingerprint != first.fingerprint


def test_a_disk_that_fails_is_tried_again(photos, monkeypatch, capsys, decoded):
    whole = load_folder(make(photos.parent / "other")).fingerprint
    real = PIL.Image.open

    def failing(path, **options):
        if str(path).endswith("ant/03.png"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", failing)
        assert load_folder(photos).fingerprint != whole
    assert "ant/03.png: input/output error" in warnings_of(capsys)[0]
    decoded.clear()
    assert load_folder(photos).fingerprint == whole
    assert decoded == ["03.png"]
    assert not warnings_of(capsys)


def test_damage_to_the_cache_is_noticed(photos, decoded, capsys):
    first = load_folder(photos)
    place = folder_module.cache.Key(photos, ("folder",)).folder
    file = place / "train_images.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    decoded.clear()
    assert load_folder(photos).fingerprint == first.fingerprint
    assert len(decoded) == 36
    assert "are damaged" in warnings_of(capsys)[0]


def empty_class(root):
    make(root)
    (root / "dog").mkdir()


def unreadable_class(root):
    make(root)
    (root / "dog").mkdir()
    (root / "dog" / "a.png").write_bytes(b"no image")


def unreadable_test(root):
    make(root / "train")
    (root / "test" / "ant").mkdir(parents=True)
    (root / "test" / "ant" / "a.png").write_bytes(b"no image")


def archive_with_one_more_folder(root):
    make(root / "inner")


LAYOUTS = {
    "nothing there": (lambda root: None, "does not exist"),
    "a file": (lambda root: root.write_text(""), "is not a folder"),
    "empty": (lambda root: root.mkdir(), "has no folders, and so no classes"),
    "no folders": (lambda root: draw(root / "a.png"), "has pictures, but no folders"),
    "one class": (lambda root: draw(root / "a" / "a.png"), "has one folder only, a, and so one"),
    "one folder too many": (archive_with_one_more_folder, "photos/inner?"),
    "an empty class": (empty_class, "has no picture to train on of the class dog"),
    "nothing readable": (unreadable_class, "1 image (dog/a.png: not an image) cannot be read"),
    "no test picture is readable": (unreadable_test, "has no picture to test on that can be read"),
    "only for testing": (lambda root: make(root / "test"), "has test but no folder train"),
    "an unknown class": (
        lambda root: (make(root / "train"), draw(root / "test" / "dog" / "a.png")),
        "photos/test has the class dog, which",
    ),
    "nothing for testing": (
        lambda root: (make(root / "train"), (root / "test" / "ant").mkdir(parents=True)),
        "photos/test has no pictures",
    ),
    "single pictures": (lambda root: make(root, 1), "has one picture of each class"),
}


@pytest.mark.parametrize(("prepare", "telling"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_are_none(prepare, telling, tmp_path):
    prepare(tmp_path / "photos")
    assert telling in refusal(tmp_path / "photos")
    assert not (tmp_path / "cache" / "cnn" / "decoded").exists()  # nothing was written


def test_a_folder_that_cannot_be_read(photos, monkeypatch):
    real = os.scandir

    def refused(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refused)
    message = refusal(photos)
    assert f"{photos / 'bee'} (Permission denied)" in message
    assert "make it readable" in message


def test_pictures_that_do_not_fit_in_memory(photos, monkeypatch):
    monkeypatch.setattr(folder_module, "available_memory", lambda: 5000)
    message = refusal(photos)
    assert "36 pictures of 8x8 in" in message
    assert "--config.dataset.image_size" in message
    assert "36 pictures of 60000x60000 in" in refusal(photos, image_size=60_000)
    assert load_folder(photos, image_size=4).image_shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        ({"image_size": -1}, "image_size=-1 must"),
        ({"resize": "pad"}, "resize='pad' must be one of crop, stretch"),
        ({"test_fraction": 0}, "test_fraction=0 must"),
        ({"test_fraction": 1.0}, "test_fraction=1.0 must"),
        ({"test_fraction": float("nan")}, "test_fraction=nan must"),
        ({"split_seed": 1.5}, "split_seed=1.5 must"),
        ({"on_unreadable": "ask"}, "on_unreadable='ask' must be one of skip, stop"),
    ],
)
def test_wrong_arguments(options, telling, photos):
    assert telling in refusal(photos, **options)


def test_an_address():
    assert "is an address" in refusal("s3://bucket/photos")


def test_names_that_are_not_utf8(tmp_path, decoded):
    names = {os.fsdecode(b"\xff"): (9, 9, 9), "a\nb": (1, 1, 1)}
    make(tmp_path / "photos", classes=names)
    first = load_folder(tmp_path / "photos")
    assert first.class_names == ("a\nb", "\udcff")
    assert load_folder(tmp_path / "photos").fingerprint == first.fingerprint
    assert len(decoded) == 24


def test_the_order_of_the_file_system_does_not_matter(photos, monkeypatch):
    expected = load_folder(photos).fingerprint
    real = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return reversed(list(self.entries))

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr("os.scandir", Reversed)
    other = make(photos.parent / "elsewhere" / "photos")
    assert load_folder(other).fingerprint == expected


def folder_config(folder):
    config = short_config()
    config.dataset.folder = str(folder)
    config.dataset.image_size = (8, 8)
    config.batch_size = 6
    config.num_epochs = 1
    return config


def test_training_on_a_folder(photos, tmp_path, monkeypatch):
    """The run resumes from any directory, but not once a picture was changed."""
    monkeypatch.chdir(photos.parent)
    _, result = cnn.train_and_evaluate(folder_config("photos"), tmp_path / "run")
    assert result["test_count"] == 6
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]
    assert recorded["folder"] == str(photos)
    assert recorded["image_size"] == [8, 8]
    monkeypatch.chdir("/")
    _, again = cnn.train_and_evaluate(folder_config(photos), tmp_path / "run")
    assert again == result
    draw(photos / "ant" / "00.png", (0, 0, 0))
    with pytest.raises(UserError, match="trained on other photos images than those found now"):
        cnn.train_and_evaluate(folder_config(photos), tmp_path / "run")
