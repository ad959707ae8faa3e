"""The benchmarks' own machinery; the peers themselves are not needed here."""

import json
import os
import subprocess
import sys

import pytest

from cnn import UserError
from tests.helpers import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts find their siblings because Python puts a script's directory first."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run_script(name, *flags):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=240,
        # Compiled as fast as can be: what is measured means nothing here.
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )


@pytest.fixture
def series():
    from rotation import Series

    def make(contender, rates, group=None, unit="images/s"):
        return Series("seed", "train", 32, contender, group or contender, unit, rates)

    return [
        make("ours", [300.0, 400.0, 500.0]),
        make("textbook", [100.0, 100.0, 100.0]),
        make("keras-graph", [150.0, 200.0, 100.0], "keras"),
        make("keras-xla", [90.0, 400.0, 90.0], "keras"),
        make("matmul-jax", [18.0, 19.0, 20.0], "matmul", "GFLOP/s"),
        make("matmul-numpy", [21.0, 22.7, 23.0], "matmul", "GFLOP/s"),
    ]


def test_quick_comparison_writes_table_samples_and_plot(tmp_path):
    flags = ("--quick", "--contenders=ours,textbook,matmul-numpy", "--out", tmp_path / "results")
    done = run_script("peers.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "the losses of 3 steps agree within" in done.stderr

    text = (tmp_path / "results" / "peers.md").read_text()
    assert done.stdout.strip() == text.strip()
    assert "| seed | train | 16 |" in text

    record = json.loads((tmp_path / "results" / "peers.json").read_text())
    assert len(record["series"]) == 4 + 3, "the loop only trains"
    for one in record["series"]:
        assert len(one["rates"]) == 2
        assert min(one["rates"]) > 0
        assert one["peak_mib"] > 50
    assert record["machine"]["versions"]["jax"]
    assert str(tmp_path) not in text + json.dumps(record)
    assert (tmp_path / "results" / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_median_ratio_and_share(series):
    from tables import best, matmul_share, ratio

    ours = best(series, "ours")
    assert best(series, "keras").contender == "keras-graph"  # by median, not by the luckiest round
    assert best(series, "pytorch") is None
    assert ratio(ours, best(series, "keras")) == (400 / 150, 300 / 150, 500 / 100)
    # 400 images/s of 22.7 MFLOP are 9.08 GFLOP/s; the faster product does 22.7.
    assert matmul_share(ours, best(series, "matmul")) == pytest.approx(0.4)


def test_tables_name_the_best_variant_and_list_all(series):
    from tables import comparison, everybody

    row = comparison(series).splitlines()[2]
    assert "| 400 (300 to 500) | 23 (21 to 23) | 40% | 4.00 (3.00 to 5.00) |" in row
    assert "2.67 (2.00 to 5.00) graph | - |" in row
    assert len(everybody(series).splitlines()) == 2 + len(series)


@pytest.mark.parametrize("what", ["losses", "logits"])
@pytest.mark.parametrize("wrong", [2.001, float("nan")])
def test_other_mathematics_is_refused(what, wrong):
    from rotation import check_agreement

    right = {"logits": [[0.0, 2.0]], "losses": [2.0, 1.5]}
    close = {"logits": [[1e-5, 2.0]], "losses": [2.00001, 1.5]}
    answers = {"textbook": right, "other": close}
    assert check_agreement(answers, "textbook") == pytest.approx(5e-6)
    answers["other"] = {**close, what: [[0.0, wrong]] if what == "logits" else [wrong, 1.5]}
    with pytest.raises(UserError, match=f"other computes something else .* first {what}"):
        check_agreement(answers, "textbook")


def test_a_worker_that_dies_is_named():
    import contenders
    import rotation

    broken = contenders.Contender("ours", "", (), {"JAX_PLATFORMS": "abacus"})
    with (
        pytest.raises(UserError, match=r"contender ours failed: .*abacus"),
        rotation.WorkerProcess(broken, "seed", 16),
    ):
        pass


def test_absent_peers_are_named(monkeypatch):
    import contenders

    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch, keras, .*pip install -e '\.\[bench\]'"):
        contenders.choose(["pytorch", "keras"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rounds=0"], "--rounds"),
        (["--seconds=soon"], "--seconds"),
        (["--batches=32,x"], "--batches"),
        (["--networks=resnet"], "unknown network 'resnet'; known: seed, net94"),
        (["--contenders=mxnet"], "unknown contender 'mxnet'"),
        (["--contenders=matmul-numpy"], "matmul alone compares nothing"),
        (["--round=3"], "unrecognized arguments: --round=3"),
    ],
)
def test_bad_flags_are_input_errors(flags, complaint):
    import peers

    with pytest.raises(UserError, match=complaint) as caught:
        peers.main(flags)
    assert "\n" not in str(caught.value)


def test_bad_flag_at_the_command_line():
    done = run_script("peers.py", "--contenders=mxnet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown contender")
    assert done.stderr.count("\n") == 1


_TALKER = """
import sys, time
print("epoch 1/2  55 %  loss 1.0000  accuracy 99.00 %  1,000 images/s  0:10 left")
print("epoch  train loss  train accuracy  test loss  test accuracy   images/s  seconds")
print("    1      1.2000         70.00 %     1.1000        63.00 %*     1,000     10.0")
time.sleep(0.3)
print("    2      1.0000         72.00 %     0.9000        63.44 %*     1,000     10.0")
time.sleep(0.3)
sys.exit(len(sys.argv) - 1)
"""


def test_time_to_the_target_is_when_its_line_arrives():
    from runs import Run, timed

    found = timed([sys.executable, "-c", _TALKER], {})
    run = Run("talker", 0, "code", False, **found)
    assert [(epoch, accuracy) for epoch, _, accuracy in run.epochs] == [(1, 0.63), (2, 0.6344)]
    assert 0.3 < run.seconds_to_target < run.wall_seconds - 0.25
    with pytest.raises(UserError, match="failed: no message"):
        timed([sys.executable, "-c", _TALKER, "fail"], {})


def test_whole_runs_are_kept_and_not_repeated(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.helpers import short_config as get_config\n"
    )
    flags = (f"--runs={config}", "--repeats=1", "--out", tmp_path / "results")
    first = run_script("whole_runs.py", *flags)
    assert first.returncode == 0, first.stderr
    assert "| tiny | 1 |" in first.stdout
    kept = (tmp_path / "results" / "whole_runs.jsonl").read_text()
    again = run_script("whole_runs.py", *flags)
    assert again.stdout == first.stdout
    assert (tmp_path / "results" / "whole_runs.jsonl").read_text() == kept
    assert str(tmp_path) not in kept + first.stdout


def test_whole_runs_want_a_config_that_exists(tmp_path):
    done = run_script("whole_runs.py", "--runs=configs/none.py", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file configs/none.py does not exist")
    assert done.stderr.count("\n") == 1


def test_quick_sweep_writes_tables_visits_and_plot(tmp_path):
    flags = ("--quick", "--rounds=1", "--axes=devices,dataset", "--out", tmp_path / "results")
    done = run_script("scaling.py", *flags)
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


def test_every_axis_holds_its_default_and_the_seeds_arithmetic():
    from contenders.problem import FLOP
    from sweep import Point, make_axes

    seed = Point(cores=6, devices=6)
    assert seed.flop == pytest.approx(FLOP["seed", "train"], rel=1e-3)
    axes = make_axes(6, quick=False)
    for name, value in {"batch": 128, "width": 32, "pixels": 32, "devices": 6}.items():
        assert axes[name].points[value] == seed
    assert list(axes["devices"].points) == [1, 2, 4, 6]


def test_a_sweep_keeps_what_it_has(tmp_path, monkeypatch):
    import scaling
    from sweep import Visit

    def visit(point, seconds, cache):
        if point.batch_size == 16:
            raise UserError("out of memory")
        return Visit(4000.0, 150.0, 300.0, lanes=1, blocks=1)

    monkeypatch.setattr(scaling, "visit", visit)
    with pytest.raises(UserError, match="out of memory"):
        scaling.main(["--quick", "--axes=batch", "--out", str(tmp_path)])
    text = (tmp_path / "scaling.md").read_text()
    assert text.startswith("**Not finished")
    assert "| 8 | 4,000 (4,000 to 4,000) | 250.0 " in text


def test_a_visit_that_fails_is_named(tmp_path):
    from sweep import Point, visit

    with pytest.raises(UserError, match=r"pixels=4.*failed: .*images of 4x4 pixels are too small"):
        visit(Point(1, 1, batch_size=2, pixels=4), 0.05, tmp_path)


def test_unknown_axis_at_the_command_line():
    done = run_script("scaling.py", "--axes=batch,colour")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown axis 'colour'; known: batch, width, depth, pix")
    assert done.stderr.count("\n") == 1
