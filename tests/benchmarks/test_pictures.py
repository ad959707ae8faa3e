"""The benchmark of `python -m cnn predict`, in its smallest form."""

import json

import PIL.Image

from benchmarks.pictures.made import make_photographs
from benchmarks.pictures.predict import OURS, _summary
from tests.benchmarks.helpers import run_benchmark


def test_it_times_our_program(tmp_path):
    done = run_benchmark(
        "pictures.predict", "--without-peers", "--pictures=2", "--rounds=1", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"| {OURS} |" in done.stdout
    record = json.loads((tmp_path / "predict.json").read_text())
    assert len(record[OURS]) == 1
    assert str(tmp_path) not in (tmp_path / "predict.md").read_text()


def test_ratios_leave_the_start_out():
    ours = [{"many": 3.0, "single": 2.0, "peak_mib": 1.0}]
    peer = [{"many": 14.0, "single": 10.0, "peak_mib": 1.0}]
    row = _summary({OURS: ours, "peer": peer}, 101).splitlines()[-1]
    assert "| 25 (25 to 25) | 4.00 (4.00 to 4.00) |" in row


def test_pictures_are_photographs_in_size(tmp_path):
    make_photographs(tmp_path / "made", 2)
    first, second = sorted((tmp_path / "made").rglob("*.jpg"))
    with PIL.Image.open(first) as image:
        assert image.size == (1152, 896)
    assert first.read_bytes() != second.read_bytes()
    assert 50_000 < first.stat().st_size < 1_000_000


def test_a_folder_is_prepared_trained_on_and_classified(tmp_path):
    flags = ("--pictures=60", "--side=100", "--epochs=1", "--out", tmp_path)
    done = run_benchmark("pictures.folder", *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "folder.json").read_text())
    assert len(record["steps"]) == 4
    assert record["damaged"] == 1
