"""The files of a run: written atomically, read back, and checked for what a run needs of them."""

import json

import pytest

from cnn import UserError
from cnn.runtime.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path) as run:
        yield run


def test_a_run_takes_over_the_records_of_its_checkpoint(run):
    """Records that a killed process wrote after it, whole or in part, are dropped."""
    one, two, three = ({"step": n, "epoch": n, "test_loss": 0.1} for n in (1, 2, 3))
    run.begin({}, [])
    assert run.records() == []
    run.append(one)
    run.append(two)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    assert run.records() == [one, two]
    run.begin({}, [one])
    assert run.records() == [one]
    run.append(three)
    assert run.records() == [one, three]


def test_a_run_with_other_metrics_is_read(run):
    """Of an earlier or a later version: only what a run needs in order to resume is required."""
    record = {"step": 7, "epoch": 0.5, "top5": 0.9}
    run.append(record)
    run.write("result.json", {"digest": "0" * 64})
    assert run.records() == [record]
    assert run.result() == {"digest": "0" * 64}


@pytest.mark.parametrize(
    "record", [{"epoch": 1}, {"step": 1}, {"step": "1", "epoch": 1}, {"step": 1, "epoch": None}]
)
def test_a_record_without_its_place_is_damage(run, record):
    run.append(record)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        run.records()


@pytest.mark.parametrize("result", [{}, {"digest": 3}, {"test_accuracy": 0.5}])
def test_a_result_without_its_digest_is_damage(run, result):
    run.write("result.json", result)
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        run.result()


def test_the_config_is_read_as_it_was_written(run):
    assert run.config() is None
    assert not run.has_begun
    run.begin({"seed": 3, "model": {"features": [4, 8]}}, [])
    assert run.config() == {"seed": 3, "model": {"features": [4, 8]}}
    assert run.has_begun
    assert json.loads((run.path / "config.json").read_text()) == run.config()


def test_one_process_holds_the_lock(run):
    with RunDirectory(run.path) as first, RunDirectory(run.path) as second:
        first.lock()
        with pytest.raises(UserError, match="is being trained in by process"):
            second.lock()
    with RunDirectory(run.path) as after:
        after.lock()
