"""The picture of accuracy against seconds and FLOPs, from kept results."""

import json

import PIL.Image
import pytest

import benchmarks.accuracy_by_cost as picture
from benchmarks.published import PUBLISHED


def speedrun_record(tta_accuracy, evaluation):
    seed = {
        "accuracy": 0.93,
        "tta_accuracy": tta_accuracy,
        "training_flop": 8e15,
        "evaluation_flop": 1e15,
        "epochs": [[4, 10.0, 0.5, 4e15], [8.01, 20.0, 0.93, 8e15]],
        "device": "2 x cpu",
        "commit": "a",
    }
    return {"config": "speed94", "seeds": [seed, seed], "evaluation": evaluation}


def test_a_speed_run_ends_with_its_last_evaluation():
    one = picture.speedrun_method(speedrun_record(0.94, {"seconds": 5.0}))
    assert (one.name, one.accuracy, one.seconds, one.pflop) == ("speed94", 0.94, 25.0, 9.0)
    assert one.path == [(10.0, 4.0, 0.5), (20.0, 8.0, 0.93)]
    plain = picture.speedrun_method(speedrun_record(None, None))
    assert (plain.accuracy, plain.seconds) == (0.93, 20.0)


def test_the_seconds_are_those_of_the_fastest_code():
    record = speedrun_record(0.94, None)
    slow, fast = record["seeds"][0], {**record["seeds"][1], "commit": "b", "tta_accuracy": 0.96}
    fast["epochs"] = [[4, 5.0, 0.7, 4e15], [8, 12.0, 0.95, 8e15]]
    one = picture.speedrun_method({**record, "seeds": [slow, fast, slow]})
    assert one.seconds == 12.0
    assert one.path == [(5.0, 4.0, 0.7), (12.0, 8.0, 0.95)]
    assert one.accuracy == pytest.approx((0.94 + 0.96 + 0.94) / 3)


def test_a_run_of_other_than_the_recipes_epochs_says_how_many():
    record = speedrun_record(0.8, None)
    for seed in record["seeds"]:
        seed["epochs"] = seed["epochs"][:1]
    assert picture.speedrun_method(record).name == "speed94 (4 epochs)"


def test_a_run_on_a_gpu_is_a_square_at_its_median(tmp_path, monkeypatch, capsys):
    warm = [{"seconds": seconds, "accuracy": 0.96} for seconds in (14.0, 15.0, 30.0)]
    flop = {"training": 3e15, "evaluation": 1e15}
    record = {
        "config": "speed96",
        "device": "NVIDIA H100",
        "num_devices": 1,
        "precisions": [{"warm": warm, "flop": flop}],
    }
    one = picture.accelerator_method(record)
    assert (one.name, one.seconds, one.pflop) == ("speed96", 15.0, 4.0)
    assert one.accuracy == pytest.approx(0.96)
    (tmp_path / "speed96_gpu.json").write_text(json.dumps(record))
    monkeypatch.setattr(picture, "_ACCELERATORS", tmp_path)
    picture.main(["--out", str(tmp_path / "docs")])
    assert "speed94, fast94_cpu, speed96" in capsys.readouterr().out


def test_it_is_drawn_from_kept_results(tmp_path, monkeypatch, capsys):
    """Those of whole runs, for configs that have no speed run."""
    (tmp_path / "speedrun_speed94.json").write_text(
        json.dumps(speedrun_record(0.94, {"seconds": 5.0}))
    )
    (tmp_path / "speedrun_speed94_steps.json").write_text("{}")
    monkeypatch.setattr(picture, "_SPEEDRUNS", tmp_path)
    monkeypatch.setattr(picture, "_ACCELERATORS", tmp_path / "none")
    picture.main(["--out", str(tmp_path / "docs")])
    assert "fast_cpu, baseline, speed94" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "docs" / "speed.png") as image:
        assert image.width > image.height > 500


def test_published_runs_are_in_order_of_their_claims():
    by_name = {one.name: one for one in PUBLISHED}
    assert by_name["airbench94, Muon"].seconds == pytest.approx(2.59)
    assert all(0.9 < one.accuracy < 1 and one.source for one in PUBLISHED)
