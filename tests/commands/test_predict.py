import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import cnn
from cnn.commands.predict import _listed_paths, _Table
from tests.helpers import REPOSITORY


@pytest.fixture
def photos(tmp_path, digits):
    """A folder of images of many kinds, two files that are damaged, and a text file."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    picture = PIL.Image.fromarray(digits.test.images[0, ..., 0]).resize((160, 200))
    picture.save(folder / "grey.png")
    picture.convert("RGB").save(folder / "inner" / "colour.jpg", quality=95)
    picture.convert("RGBA").save(folder / "opaque.webp", lossless=True)
    picture.convert("CMYK").save(folder / "print.tiff")
    picture.convert("P").save(folder / "palette.gif")
    PIL.Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(folder / "deep.png")
    content = (folder / "inner" / "colour.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("of no concern")
    return folder


GOOD = ["deep.png", "grey.png", "inner/colour.jpg", "opaque.webp", "palette.gif", "print.tiff"]


def test_a_folder_of_all_kinds(command, trained_run, photos, digits):
    code, out, err = command("predict", trained_run, photos, "--json", "--top-k", "10")
    answers = {row["path"]: row for row in json.loads(out)}
    assert code == 1
    assert [name for name in answers if "error" not in answers[name]] == [
        str(photos / name) for name in GOOD
    ]
    assert f"warning: {photos / 'cut.jpg'} cannot be read: truncated" in err
    assert f"warning: {photos / 'text.png'} cannot be read: not an image" in err
    assert err.splitlines()[-1] == "warning: 2 of 8 files could not be read"
    with PIL.Image.open(photos / "grey.png") as picture:
        expected = cnn.load_run(trained_run).predict([picture])[0]
    for name in GOOD:
        found = answers[str(photos / name)]["predictions"]
        assert [row["probability"] for row in found] == sorted(
            (row["probability"] for row in found), reverse=True
        )
        chances = {row["class"]: row["probability"] for row in found}
        np.testing.assert_allclose(
            [chances[name] for name in digits.class_names], expected, atol=0.02
        )


def test_csv_has_a_row_per_file(command, trained_run, photos):
    code, out, _ = command("predict", trained_run, photos, "--csv", "--top-k", "2")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 1
    assert len(rows) == 8
    assert list(rows[0])[:5] == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    failed = {row["path"]: row["error"] for row in rows if row["error"]}
    assert failed == {
        str(photos / "cut.jpg"): "truncated",
        str(photos / "text.png"): "not an image",
    }


def test_files_in_their_order_and_batches(command, trained_run, photos):
    names = [photos / "print.tiff", photos / "grey.png", photos / "deep.png"]
    code, out, err = command("predict", trained_run, *names, "--batch-size", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0][-8:] for line in lines] == [str(name)[-8:] for name in names]
    assert all(line.count(" %") == 3 for line in lines)


def test_the_table_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("cnn.commands.predict.is_live", lambda: True)
    path = "photos/of/flowers/daisy-1234.jpg"
    for columns, classes in ((39, 1), (60, 2), (79, 2)):
        monkeypatch.setattr("cnn.commands.predict.width", lambda columns=columns: columns)
        table = _Table(3, [path])
        table.row(path, [("daisy_white", 0.9), ("daisy_yellow", 0.09), ("rose" * 30, 0.01)])
        table.row(path, [("rose" * 30, 1.0)])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        assert [line.count(" %") for line in lines] == [classes, 1]
        assert all(line.split()[0].endswith("-1234.jpg"[-9:]) for line in lines)


def test_standard_input(trained_run, photos):
    def predict(content):
        return subprocess.run(
            [sys.executable, "-m", "cnn", "predict", trained_run, "-", "--csv"],
            input=content,
            capture_output=True,
            cwd=REPOSITORY,
            timeout=120,
        )

    done = predict((photos / "grey.png").read_bytes())
    assert done.stdout.decode().splitlines()[1].startswith("-,")
    paths = f"{photos / 'grey.png'}\n{photos / 'absent.png'}\n"
    done = predict(paths.encode())
    assert done.returncode == 1
    assert "absent.png cannot be read: no such file" in done.stderr.decode()
    assert len(done.stdout.decode().splitlines()) == 3
    done = predict(b"\xff\xfe\x00 neither")
    assert done.returncode == 2
    assert b"neither an image nor a list of paths" in done.stderr


def test_lists_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.png")).touch()
    for content, paths in (
        (b"a.png\0 b\nc.png\0", ["a.png", " b\nc.png"]),
        (b"a.png\0b.png", ["a.png", "b.png"]),
        (b"a.png\r\n\n b.png \n", ["a.png", "b.png"]),
        (b"\xff.png\0a.png\0", ["\udcff.png", "a.png"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"", []),
    ):
        assert _listed_paths(content) == paths
    for content in (b"PK\3\4\0\0\0\xff", b"\0", b"\xfe\n", b"a\0\0b"):
        with pytest.raises(cnn.UserError, match="neither an image nor a list of paths"):
            _listed_paths(content)


def test_what_is_no_file_is_reported_and_not_waited_for(command, trained_run, tmp_path):
    os.mkfifo(tmp_path / "ff.png")
    code, _, err = command("predict", trained_run, tmp_path / "ff.png")
    assert code == 1
    assert f"warning: {tmp_path / 'ff.png'} cannot be read: not a regular file" in err


def test_the_path_of_standard_input_is_refused(command, trained_run, monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr("cnn.commands.predict._STDIN_DESCRIPTOR", reader)
    code, out, err = command("predict", trained_run, f"/dev/fd/{reader}")
    os.close(reader)
    os.close(writer)
    assert (code, out) == (2, "")
    assert err == f"error: /dev/fd/{reader} is standard input: give - to have it read\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "0", "x.png"], "--top-k=0 must be 1 or more"),
        (["--batch-size", "0", "x.png"], "--batch-size=0 must be 1 or more"),
        ([], "the following arguments are required: IMAGE|FOLDER|-"),
        (["--json", "--csv", "x.png"], "not allowed with argument"),
        (["{empty}"], "there is no image file in"),
    ],
)
def test_mistakes_are_one_line(command, trained_run, tmp_path, flags, message):
    flags = [flag.replace("{empty}", str(tmp_path)) for flag in flags]
    code, out, err = command("predict", trained_run, *flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_not_a_run(command, tmp_path):
    code, _, err = command("predict", tmp_path, "x.png")
    assert code == 2
    assert "is not a run directory" in err
