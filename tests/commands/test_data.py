"""python -m cnn data: what is printed, and what is refused."""

import json

import numpy as np
import PIL.Image
import pytest

import cnn
from cnn.__main__ import main
from cnn.data import load_dataset
from cnn.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("cnn.__main__.raise_on_signals", lambda: None)
    for name, colour in (("ant", (200, 0, 0)), ("bee", (0, 200, 0))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            image = PIL.Image.new("RGB", (10 + i, 12), colour)
            image.save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path


def test_show_a_folder(here, capsys):
    (here / "photos" / "ant" / "bad.png").write_bytes(b"")
    assert main(["data", "show", "photos", "--image-size", "(8, 6)"]) is None
    out, err = capsys.readouterr()
    assert "name         photos\nimages       8x6x3\nmean         0.3922 0.3922 0.0000" in out
    assert "      10        2  ant\n      10        2  bee\n      20        4  all 2" in out
    assert "ant/bad.png: not an image" in err
    with PIL.Image.open(here / "samples.png") as sheet:
        assert sheet.format == "PNG"
        colours = np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0).tolist()
    assert [200, 0, 0] in colours
    assert [0, 200, 0] in colours
    assert not list(here.glob("samples*.tmp"))


def test_json_is_all_that_is_printed(here, capsys, monkeypatch):
    monkeypatch.setattr("cnn.runtime.screen._PATIENCE", 0.001)
    words = ["--image-size=8", "--split=test", "--json", "--output=new/folder/a.png"]
    main(["data", "show", "photos", *words])
    facts = json.loads(capsys.readouterr().out)
    data = cnn.load_folder("photos", image_size=8)
    assert facts["fingerprint"] == data.fingerprint
    assert facts["image_shape"] == [8, 8, 3]
    assert facts["class_names"] == ["ant", "bee"]
    assert (facts["train_counts"], facts["test_counts"]) == ([10, 10], [2, 2])
    assert (here / facts["samples"]).is_file()


def test_prepare_list_and_show_by_name(here, capsys):
    main(["data", "list"])
    before = capsys.readouterr().out
    assert before.endswith(f"Prepared in {here / 'tfds'}:\n  none\n")
    for name in ("cifar10", "digits", "mnist"):
        assert f"\n  {name}\n" in before
    main(["data", "prepare", "digits"])
    place = here / "tfds" / "digits" / "1.0.0"
    assert capsys.readouterr().out == f"digits is prepared in {place}\n"
    (here / "tfds" / "broken" / "1.0.0").mkdir(parents=True)
    main(["data", "list"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  digits:1.0.0: 1,437 train, 360 test; 10 classes; 1 MB"
    main(["data", "list", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["names"][0] == "cifar10"
    assert facts["directory"] == str(here / "tfds")
    (prepared,) = facts["prepared"]
    assert prepared.pop("num_bytes") > 1e5
    counts = {"train": 1437, "test": 360}
    assert prepared == {"name": "digits:1.0.0", "counts": counts, "num_classes": 10}
    main(["data", "prepare", "digits", "--json"])
    assert json.loads(capsys.readouterr().out) == {"name": "digits", "directory": str(place)}
    main(["data", "show", "digits", "--output", "d.png"])
    out = capsys.readouterr().out
    assert load_dataset("digits").fingerprint in out
    assert "images       8x8x1" in out


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        ([], "required: list|prepare|show"),
        (["sow"], "invalid choice: 'sow'"),
        (["prepare"], "required: NAME"),
        (["prepare", "a b"], "'a b' is not a dataset name"),
        (["show"], "required: NAME|FOLDER"),
        (["show", "./none"], "none does not exist"),
        (["show", "photos"], "--image-size 64 of data show"),
        (["show", "photso"], "photso is no folder here, and there is no dataset 'photso' in TFDS"),
        (["show", "my-photos"], "my-photos is no folder here, and 'my-photos' is not a dataset"),
        (["show", "photos.zip"], "photos.zip is not a folder, and 'photos.zip' is not a dataset"),
        (["show", "photos", "--image-size=x"], "image_size='x' must be a number of pixels"),
        (["show", "photos", "--image-size=-1"], "image_size=-1 must"),
        (["show", "photos", "--resize=fit"], "invalid choice: 'fit'"),
        (["show", "photos", "--test-fraction=2"], "test_fraction=2.0 must"),
        (["show", "photos", "--image-size=8", "--output=a.jpg"], "a file that ends in .png"),
        (["show", "photos", "--image-size=8", "--output=d.png"], "is a folder; give the name of a"),
        (["show", "photos", "--outp=a.png"], "python -m cnn data show --help"),
        (["list", "--jsn"], "unrecognized arguments: --jsn; python -m cnn data list --help"),
        (["--jsn", "list"], "unrecognized arguments: --jsn; python -m cnn data --help"),
    ],
)
def test_what_is_refused(flags, telling, here, capsys):
    (here / "d.png").mkdir()
    (here / "photos.zip").touch()
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError) as error:
        main(["data", *flags])
    assert telling in str(error.value)
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


def test_a_picture_that_cannot_be_written(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="the picture cannot be written: No space left"):
        main(["data", "show", "photos", "--image-size=8"])
    assert not list(here.glob("samples*"))
