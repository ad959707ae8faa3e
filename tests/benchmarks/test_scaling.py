"""The sweep over batch, width, depth, pixels, devices and dataset."""

import json

import pytest

import benchmarks.scaling.__main__ as scaling
from benchmarks.peers.contenders.problem import FLOP
from benchmarks.scaling.sweep import Point, Visit, make_axes, visit
from cnn import UserError
from tests.benchmarks.helpers import run_benchmark


def test_quick_sweep_writes_tables_visits_and_plot(tmp_path):
    flags = ("--quick", "--rounds=1", "--axes=devices,dataset", "--out", tmp_path / "results")
    done = run_benchmark("scaling", *flags)
    assert done.returncode == 0, done.stderr
    assert "round 1/1, dataset 2,000: " in done.stderr

    text = (tmp_path / "results" / "scaling.md").read_text()
    assert done.stdout.strip() == text.strip()
    record = json.loads((tmp_path / "results" / "scaling.json").read_text())
    assert list(record["axes"]) == ["devices", "dataset"]
    assert record["finished"]
    assert "Not finished" not in text
    for rows in record["axes"].values():
        for row in rows:
            (visit,) = row["visits"]
            assert visit["images_per_second"] > 0
            assert visit["peak_mib"] > visit["start_mib"] > 50
            # Of the dataset only, as the others find their batches on the devices.
            assert (visit["place_ms"] > 0) == (visit["order_ms"] > 0) == (row["value"] >= 1000)
    assert str(tmp_path) not in text + json.dumps(record)
    assert (tmp_path / "results" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_every_axis_holds_the_default_with_the_arithmetic_of_the_baseline():
    default = Point(cores=6, devices=6)
    assert default.flop == pytest.approx(FLOP["baseline", "train"], rel=1e-3)
    axes = make_axes(6, quick=False)
    for name, value in {"batch": 128, "width": 32, "pixels": 32, "devices": 6}.items():
        assert axes[name].points[value] == default
    assert list(axes["devices"].points) == [1, 2, 4, 6]


def test_a_sweep_keeps_what_it_has(tmp_path, monkeypatch):
    def visit(point, seconds, cache, changes):
        if point.batch_size == 16:
            raise UserError("out of memory")
        return Visit(4000.0, 150.0, 300.0, num_shards=1, num_microbatches=1)

    monkeypatch.setattr(scaling, "visit", visit)
    with pytest.raises(UserError, match="out of memory"):
        scaling.main(["--quick", "--axes=batch", "--out", str(tmp_path)])
    text = (tmp_path / "scaling.md").read_text()
    assert text.startswith("**Not finished")
    assert "| 8 | 4,000 (4,000 to 4,000) | 250.0 " in text


def test_a_visit_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"pixels=4.*failed: .*images of 4x4 pixels are too small"):
        visit(Point(1, 1, batch_size=2, pixels=4), 0.05, tmp_path)


def test_an_unknown_axis_is_an_input_error():
    with pytest.raises(UserError, match="unknown axis 'colour'; known: batch, width, depth, pix"):
        scaling.main(["--axes=batch,colour"])
