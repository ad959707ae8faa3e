"""Many seeds and sweeps, as `train.py` trains them."""

import json
import os
import signal
import statistics
import subprocess
import time

import jax
import numpy as np
import pytest
from scipy import stats

import cnn
from cnn import Interrupted, UserError, train_and_evaluate, train_group
from cnn.config import override
from tests.helpers import records_of, short_config, start, train_command, wait_for


def group_config(*flags, layout="in_turn"):
    flags = (f"--config.runtime.group_layout={layout}", *flags)
    return override(
        short_config(), [f"--config.{flag.removeprefix('--config.')}" for flag in flags]
    )


def digests(result):
    return {one["name"]: one["digest"] for one in result["members"]}


@pytest.fixture(scope="module")
def singles(tmp_path_factory, digits):
    """The results of single runs, by seed."""
    results = {}
    for seed in (0, 1):
        config = override(short_config(), [f"--config.seed={seed}"])
        _, results[seed] = train_and_evaluate(config, tmp_path_factory.mktemp("single"))
    return results


@pytest.fixture(scope="module")
def group(tmp_path_factory, digits):
    """A finished group of two seeds."""
    workdir = tmp_path_factory.mktemp("group")
    return workdir, train_group(group_config("num_seeds=2"), workdir)


def test_a_member_is_the_single_run_bit_for_bit(group, singles):
    workdir, result = group
    assert digests(result) == {f"seed={seed}": singles[seed]["digest"] for seed in singles}
    member = workdir / "members" / "seed=1"
    again = override(short_config(), ["--config.seed=1"])
    assert train_and_evaluate(again, member)[1]["digest"] == singles[1]["digest"]
    assert cnn.load_run(member).predict(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 10)


def test_the_result_is_the_statistics_over_seeds(group, singles):
    workdir, result = group
    assert json.loads((workdir / "result.json").read_text()) == result
    accuracies = [one["test_accuracy"] for one in singles.values()]
    (point,) = result["points"]
    found = point["statistics"]["test_accuracy"]
    assert (found["count"], point["num_diverged"], point["settings"]) == (2, 0, {})
    assert found["mean"] == statistics.fmean(accuracies)
    assert found["std"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-12)
    ends = stats.t.interval(0.95, 1, found["mean"], stats.sem(accuracies))
    assert found["interval"] == pytest.approx(list(ends), rel=1e-12)
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing(group, capsys):
    workdir, result = group
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert train_group(group_config("num_seeds=2"), workdir) == result
    assert "finished before: test accuracy" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_another_config_in_its_directory_is_refused(group):
    workdir, _ = group
    with pytest.raises(UserError, match=r"batch_size: 96 -> 32"):
        train_group(group_config("num_seeds=2", "batch_size=32"), workdir)
    with pytest.raises(UserError, match="holds a group of runs"):
        train_and_evaluate(short_config(), workdir)
    with pytest.raises(UserError, match="holds a single run"):
        train_group(group_config("num_seeds=2"), workdir / "members" / "seed=0")
    with pytest.raises(UserError, match="train_group trains"):
        train_and_evaluate(group_config("num_seeds=2"), workdir)


def test_more_seeds_and_another_layout_train_the_new_ones_only(group, singles, tmp_path, capsys):
    """With a run on each device, which is the single run on one device bit for bit."""
    workdir, _ = group
    result = train_group(group_config("num_seeds=4", layout="per_device"), workdir)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(row[0] for row in rows if row[-1:] and row[0] in "0123") == ["2", "3"]
    assert digests(result)["seed=1"] == singles[1]["digest"]
    for seed in (2, 3):
        flags = [f"--config.seed={seed}", "--config.runtime.num_devices=1"]
        _, single = train_and_evaluate(override(short_config(), flags), tmp_path / str(seed))
        assert digests(result)[f"seed={seed}"] == single["digest"]
    assert result["points"][0]["statistics"]["test_loss"]["count"] == 4


def test_side_by_side_equals_one_after_another_up_to_rounding(singles, tmp_path):
    augmented = ("augment.flip=true", "num_seeds=2")
    result = train_group(group_config("num_seeds=2", layout="vmap"), tmp_path / "a")
    for seed, member in enumerate(result["members"]):
        assert member["test_loss"] == pytest.approx(singles[seed]["test_loss"], rel=1e-4)
        assert member["train_loss"] == pytest.approx(singles[seed]["train_loss"], rel=1e-4)
        assert member["test_count"] == 360
    first = train_group(group_config(*augmented), tmp_path / "b")
    other = train_group(group_config(*augmented, layout="vmap"), tmp_path / "c")
    for one, same in zip(first["members"], other["members"], strict=True):
        assert one["train_loss"] == pytest.approx(same["train_loss"], rel=1e-4)


def test_a_sweep_compares_its_points(tmp_path, capsys):
    flags = ("sweep.optimizer.learning_rate=(1e-4, 1e-2)", "num_seeds=2")
    result = train_group(group_config(*flags, layout="per_device"), tmp_path)
    slow, fast = result["points"]
    assert slow["settings"] == {"optimizer.learning_rate": 1e-4}
    assert result["best"] == fast
    assert result["num_points"] == 2
    accuracies = [one["test_accuracy"] for one in result["members"][2:]]
    assert fast["statistics"]["test_accuracy"]["mean"] == statistics.fmean(accuracies)
    assert "best of 2 settings: optimizer.learning_rate=0.01" in capsys.readouterr().out
    for name in ("sweep.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    wider = ("sweep.optimizer.learning_rate=(1e-4, 1e-2, 1e-3)", "num_seeds=2")
    grown = train_group(group_config(*wider, layout="per_device"), tmp_path)
    assert grown["points"][:2] == result["points"]
    assert len(grown["members"]) == 6


def test_the_programs_of_earlier_points_are_dropped(tmp_path, monkeypatch):
    """While the other thread trains: else a sweep of a hundred points would end in a crash."""
    flags = ("sweep.optimizer.learning_rate=(1e-4, 1e-3, 1e-2)", "num_seeds=2")
    config = group_config(*flags, layout="per_device")
    whole = train_group(config, tmp_path / "whole")
    calls, clear = [], jax.clear_caches
    with monkeypatch.context() as patch:
        patch.setattr(cnn.groups, "_POINTS_KEPT", 1)
        patch.setattr(jax, "clear_caches", lambda: (calls.append(None), clear()))
        again = train_group(config, tmp_path / "again")
    assert len(calls) == 3
    assert digests(again) == digests(whole)


@pytest.mark.parametrize("layout", ["in_turn", "vmap"])
def test_a_run_that_diverges_is_counted_and_leaves_the_others_alone(tmp_path, layout, monkeypatch):
    """Seed 1 gets a gradient that is not finite in its second epoch."""
    whole = train_group(group_config("num_seeds=3", layout=layout), tmp_path / "whole")
    end_epoch = cnn.ledger.Ledger.end_epoch

    def with_nan(self, state, metrics, tested, speed):
        if self._experiment.config.seed == 1 and int(state.step) == 28:
            tested = tested.replace(sums={**tested.sums, "loss": float("nan")})
        return end_epoch(self, state, metrics, tested, speed)

    with monkeypatch.context() as patch:
        patch.setattr(cnn.ledger.Ledger, "end_epoch", with_nan)
        result = train_group(group_config("num_seeds=3", layout=layout), tmp_path / "part")
    (error,) = result["diverged"]
    assert (error["name"], result["points"][0]["num_diverged"]) == ("seed=1", 1)
    assert "the test loss became nan" in error["error"]
    expected = digests(whole)
    del expected["seed=1"]
    assert digests(result) == expected
    again = train_group(group_config("num_seeds=3", layout=layout), tmp_path / "part")
    assert again == result


def test_a_group_of_which_all_diverge_is_an_error(tmp_path):
    with pytest.raises(UserError, match="all 2 runs diverged: step 2 gave a loss"):
        train_group(
            group_config("num_seeds=2", "optimizer.learning_rate=1e30", "optimizer.name=sgd"),
            tmp_path,
        )


@pytest.mark.parametrize("layout", ["per_device", "vmap"])
def test_a_signal_saves_the_runs_and_the_same_command_resumes_them(tmp_path, layout, monkeypatch):
    config = group_config("num_seeds=2", layout=layout)
    whole = train_group(config, tmp_path / "whole")
    begin = cnn.ledger.Ledger.end_epoch

    def interrupting(self, *args):
        if len(self.records) == 0 and self._experiment.config.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return begin(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cnn.ledger.Ledger, "end_epoch", interrupting)
        with pytest.raises(Interrupted, match="stopped by SIGTERM: 0 of 2 runs are finished") as it:
            train_group(config, tmp_path / "part")
    assert it.value.signal == signal.SIGTERM
    assert len(records_of(tmp_path / "part" / "members" / "seed=1")) == 1
    assert digests(train_group(config, tmp_path / "part")) == digests(whole)


def test_a_signal_between_two_runs_leaves_the_second_for_later(tmp_path, monkeypatch):
    show = cnn.groups._Group._show

    def interrupting(self, outcome):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        show(self, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(cnn.groups._Group, "_show", interrupting)
        with pytest.raises(Interrupted, match="stopped by SIGTERM: 1 of 2 runs are finished"):
            train_group(group_config("num_seeds=2"), tmp_path)
    assert not (tmp_path / "members" / "seed=1").exists()
    assert len(train_group(group_config("num_seeds=2"), tmp_path)["members"]) == 2


def test_a_run_that_cannot_be_saved_stops_the_others(tmp_path, monkeypatch):
    end_epoch = cnn.ledger.Ledger.end_epoch

    def failing(self, *args):
        if self._experiment.config.seed == 1:
            raise UserError("the disk is full")
        return end_epoch(self, *args)

    monkeypatch.setattr(cnn.ledger.Ledger, "end_epoch", failing)
    config = group_config("num_seeds=2", "num_epochs=1000", layout="per_device")
    with pytest.raises(UserError, match="the disk is full"):
        train_group(config, tmp_path)
    assert not (tmp_path / "members" / "seed=0" / "result.json").exists()
    assert not (tmp_path / "result.json").exists()


def test_a_group_survives_sigkill_bit_for_bit(tmp_path):
    """Each run is saved at a step of its own then."""
    flags = ("--config=digits", "--config.num_seeds=3", "--config.num_epochs=6", "--workdir")
    whole = subprocess.run(train_command(*flags, tmp_path / "whole"), capture_output=True)
    assert whole.returncode == 0, whole.stderr
    metrics = tmp_path / "part" / "members" / "seed=1" / "metrics.jsonl"
    with start(train_command(*flags, tmp_path / "part")) as process:
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, process)
        process.send_signal(signal.SIGKILL)
    last = subprocess.run(train_command(*flags, tmp_path / "part"), capture_output=True)
    assert last.returncode == 0, last.stderr
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "part")
    ]
    assert results[0]["digest"] == results[1]["digest"]
    assert b"test accuracy" in last.stdout
