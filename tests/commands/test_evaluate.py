import argparse
import csv
import dataclasses
import json
import os

import numpy as np
import PIL.Image
import pytest

import cnn
from cnn.commands import evaluate
from cnn.commands.evaluate import _class_table, _confusion_text
from cnn.runtime.disk import atomic_write
from tests.helpers import short_config

FILES = {"evaluation.json", "predictions.csv", "predictions.npz"}
PICTURES = {"confusion.png", "reliability.png", "mistakes.png"}


def test_figures_and_files(command, own_copy, digits):
    code, out, _ = command("evaluate", own_copy)
    result = json.loads((own_copy / "result.json").read_text())
    folder = own_copy / "evaluation" / "test"
    assert code == 0
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    figures = json.loads((folder / "evaluation.json").read_text())
    assert figures["accuracy"] == result["test_accuracy"]
    assert figures["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert figures["count"] == 360 == sum(row["count"] for row in figures["classes"])
    assert f"accuracy: {100 * figures['accuracy']:.2f} %, 95 % interval" in out
    assert "confusion (rows: true class, columns: predicted class)" in out
    assert all(len(line) <= 79 for line in out.splitlines() if "/" not in line)
    for name in PICTURES:
        with PIL.Image.open(folder / name) as picture:
            assert min(picture.size) > 400

    check_predictions(folder, digits)


def check_predictions(folder, digits):
    """They can be scored again."""
    with np.load(folder / "predictions.npz") as stored:
        logits, labels = stored["logits"], stored["labels"]
        assert tuple(stored["class_names"]) == digits.class_names
        assert str(stored["fingerprint"]) == digits.fingerprint
    np.testing.assert_array_equal(labels, digits.test.labels)
    with open(folder / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prediction"] for row in rows] == [digits.class_names[i] for i in logits.argmax(-1)]
    right = sum(int(row["correct"]) for row in rows)
    assert right / 360 == json.loads((folder / "evaluation.json").read_text())["accuracy"]


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("cnn.commands.evaluate._draw", lambda *_: None)  # each takes a second


def test_json_and_options(command, own_copy, tmp_path, without_pictures):
    options = ("--json", "--split=train", "--tta=flip", "--checkpoint=best", "--top-k=2")
    code, out, err = command("evaluate", own_copy, *options)
    figures = json.loads(out)
    assert code == 0, err
    assert (figures["count"], figures["split"], figures["tta"]) == (1437, "train", "flip")
    assert figures["top2_accuracy"] >= figures["accuracy"]
    assert (own_copy / "evaluation" / "train-best-flip" / "evaluation.json").exists()
    code, _, _ = command("evaluate", own_copy, "--output", tmp_path / "elsewhere")
    assert code == 0
    assert (tmp_path / "elsewhere" / "predictions.csv").exists()


def test_a_dataset_that_a_script_passed(command, tmp_path, digits):
    config = short_config()
    config.num_epochs = 1
    cnn.train_and_evaluate(config, tmp_path / "run", dataset=digits)
    code, _, err = command("evaluate", tmp_path / "run")
    assert code == 2
    assert "a dataset that a script passed: score it there" in err


def test_the_paths_of_the_pictures(command, own_copy, digits, monkeypatch, without_pictures):
    """A name that is not UTF-8, or has a line break, does not break the table."""
    test = digits.test
    names = (os.fsdecode(b"1/\xff.png"), 'a\n"b",c.png', *map(str, range(2, len(test))))
    named = dataclasses.replace(digits, test=cnn.Split(test.images, test.labels, names))
    monkeypatch.setattr("cnn.commands.common.load_config_dataset", lambda _: named)
    code, _, err = command("evaluate", own_copy)
    assert (code, err) == (0, "")
    folder = own_copy / "evaluation" / "test"
    check_predictions(folder, digits)
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[:3] == ["index", "path", "label"]
    assert [row["path"] for row in rows] == [r"1/\udcff.png", *names[1:]]
    with np.load(folder / "predictions.npz") as stored:
        assert tuple(stored["paths"].tolist()) == names


def test_many_classes_are_shown_as_pairs():
    confusion = 10 * np.eye(40, dtype=int)
    confusion[3, 7], confusion[20, 2] = 5, 6
    assert _confusion_text([f"c{i}" for i in range(40)], confusion) == [
        "most confused (true class, predicted class, images)",
        "  c20, c2, 6",
        "  c3, c7, 5",
    ]


COLUMNS = [39, 50, 79]


@pytest.mark.parametrize("columns", COLUMNS)
def test_tables_fit_the_screen(columns, monkeypatch):
    monkeypatch.setattr("cnn.commands.evaluate.width", lambda: columns)
    scores = {"count": 1234, "precision": 1.0, "recall": 0.5, "f1": 2 / 3}
    rows = [{"name": name, **scores} for name in ("daisy_white", "daisy_yellow", "x" * 70)]
    lines = _class_table(rows)
    assert max(map(len, lines)) <= columns
    assert lines[0].split() == {
        39: ["class", "recall", "F1"], 50: ["class", "precision", "recall", "F1"],
        79: ["class", "images", "precision", "recall", "F1"],
    }[columns]  # fmt: skip
    assert all(line.endswith("66.67 %") for line in lines[1:])
    monkeypatch.setattr("cnn.commands.evaluate.width", lambda: 30)
    assert _class_table(rows)[0].split() == ["class", "F1"]


def test_columns_of_the_matrix_have_whole_names_or_numbers(monkeypatch):
    names, confusion = ["daisy_white", "daisy_yellow", "rose"], 10 * np.eye(3, dtype=int)
    _, header, *_ = _confusion_text(names, confusion)
    assert header.split() == names
    monkeypatch.setattr("cnn.commands.evaluate.width", lambda: 39)
    lines = _confusion_text(names, confusion)[1:]
    assert lines[0].split() == ["1", "2", "3"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", names[0]], ["2", names[1]],
                                                        ["3", names[2]]]  # fmt: skip
    assert max(map(len, lines)) <= 39


def test_an_interrupted_evaluation_leaves_no_older_picture(own_copy, monkeypatch, without_pictures):
    """Nor old figures beside new predictions."""
    folder = own_copy / "evaluation" / "test"
    folder.mkdir(parents=True)
    for name in FILES | PICTURES:
        (folder / name).write_text("old")
    seen = []

    def interrupted(target):
        seen.append(sorted(path.name for path in folder.iterdir()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return atomic_write(target)

    monkeypatch.setattr(evaluate, "atomic_write", interrupted)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(parser.parse_args([str(own_copy)]))
    assert seen == [[], ["predictions.csv"], ["predictions.csv", "predictions.npz"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "0"], "--top-k=0 must be 1 or more"),
        (["--checkpoint", "7"], "has no checkpoint '7'"),
        (["--split", "val"], "invalid choice"),
        (["--output", "/proc/x"], "choose another --output"),
        (["--outptu", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(command, trained_run, flags, message):
    code, out, err = command("evaluate", trained_run, *flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_other_images_are_a_warning(command, own_copy, monkeypatch, digits, without_pictures):
    other = cnn.Dataset.from_splits(
        "digits",
        train=digits.test,
        test=cnn.Split(digits.test.images[:7], digits.test.labels[:7]),
        class_names=digits.class_names,
    )
    monkeypatch.setattr("cnn.commands.common.load_config_dataset", lambda _: other)
    code, out, err = command("evaluate", own_copy)
    assert code == 0
    assert "7 test images" in out
    assert "warning: the images of digits are not those that the run was trained on" in err


def test_a_picture_that_fails_is_a_warning(command, own_copy, monkeypatch):
    def fail(*_, **__):
        raise OSError("no fonts")

    monkeypatch.setattr("cnn.commands.evaluate.plot_confusion", fail)
    code, out, err = command("evaluate", own_copy)
    assert code == 0
    assert "accuracy:" in out
    assert "warning: confusion.png is not drawn (no fonts)" in err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_run_that_is_read_only(command, own_copy):
    own_copy.chmod(0o500)
    code, _, err = command("evaluate", own_copy)
    own_copy.chmod(0o700)
    assert code == 2
    assert "choose another --output" in err
