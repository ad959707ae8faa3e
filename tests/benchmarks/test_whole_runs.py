"""Whole processes that are timed from outside."""

import sys

import pytest

import benchmarks.whole_runs.__main__ as whole_runs
from benchmarks.whole_runs.runs import Run, timed
from cnn import UserError
from tests.benchmarks.helpers import run_benchmark
from tests.helpers import REPOSITORY

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
    first = run_benchmark("whole_runs", *flags)
    assert first.returncode == 0, first.stderr
    assert "| tiny | 1 |" in first.stdout
    kept = (tmp_path / "results" / "whole_runs.jsonl").read_text()
    again = run_benchmark("whole_runs", *flags)
    assert again.stdout == first.stdout
    assert (tmp_path / "results" / "whole_runs.jsonl").read_text() == kept
    assert str(tmp_path) not in kept + first.stdout


def test_whole_runs_want_a_config_that_exists(tmp_path):
    with pytest.raises(UserError, match=r"config file configs/none\.py does not exist"):
        whole_runs.main(["--runs=configs/none.py", "--out", str(tmp_path)])
