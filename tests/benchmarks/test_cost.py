"""What benchmarks.reliability.cost measures with and without, and the summary of its samples."""

import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import cnn
from benchmarks.reliability import cost
from benchmarks.reliability.cost import Row, Summary
from cnn import UserError
from tests.benchmarks.helpers import run_benchmark


def test_quick_run_writes_table_and_samples(tmp_path):
    done = run_benchmark("reliability.cost", "--quick", "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr

    text = (tmp_path / "results" / "cost.md").read_text()
    assert done.stdout.strip() == text.strip()
    record = json.loads((tmp_path / "results" / "cost.json").read_text())
    assert record["command"] == "python -m benchmarks.reliability.cost --quick"
    assert record["machine"]["versions"]["jax"]
    goals = [row["goal"] for row in record["rows"] if row["met"] is not None]
    assert goals == [1.0, 3.0, 1.0, 1.0]
    for row in record["rows"]:
        assert f"| {row['what']} |" in text
        if isinstance(row["seconds"], dict):
            assert len(row["seconds"]["on"]) == len(row["seconds"]["off"]) == 2
    assert str(tmp_path) not in text + json.dumps(record)
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["cost.json", "cost.md"], "the checkpoints are gone"


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--rounds=none", "--rounds: invalid positive number value: 'none'"),
        ("--rounds=1", "--rounds is 2 or more"),
        ("--round=3", "unrecognized arguments: --round=3"),
    ],
)
def test_bad_flags_are_input_errors(flag, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        cost.main([flag])
    assert "\n" not in str(caught.value)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dense(10)(image.reshape(image.shape[0], -1))


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_is_there_or_not(guard):
    state = cnn.create_train_state(Linear(), optax.adam(1e-3), jax.random.key(0), (2, 2, 3))
    batches = {
        "image": np.full((1, 4, 2, 2, 3), np.nan, np.float32),
        "label": np.zeros((1, 4), np.int32),
    }
    state, metrics = cost.trainer(guard)(state, batches, 1)
    assert (metrics.count[0] == 0) == guard


def test_pairs_are_taken_side_by_side():
    order = []

    def sampler(name, seconds):
        def sample():
            order.append(name)
            return seconds

        return sample

    pairs = {
        "a": (sampler("a+", 3.0), sampler("a-", 2.0)),
        "b": (sampler("b+", 1), sampler("b-", 1)),
    }
    found = cost.in_turns(pairs, 2)
    assert order == ["a-", "a+", "b-", "b+", "a+", "a-", "b+", "b-"]
    assert found["a"] == ([3.0, 3.0], [2.0, 2.0])
    assert found["a"].overheads() == [0.5, 0.5]
    assert found["a"].differences() == [1.0, 1.0]


def test_summary_holds_the_median_by_ranks():
    # Of 100 samples the 40th and the 61st, as tables of the sign test have it.
    found = Summary.of([float(n) for n in range(100, 0, -1)])
    assert found == (50.5, (40.0, 61.0), (25.75, 75.25), 100)
    assert Summary.of([2.0, 1.0]) == (1.5, (1.0, 2.0), (1.25, 1.75), 2)


def test_share_of_a_run_counts_eleven_saves():
    assert cost.saves_share(first=1.0, each=0.1, epoch=9.8) == pytest.approx(2.0)


def test_a_row_says_whether_its_goal_is_met():
    found = Summary(0.5, (0.4, 1.2), (0.1, 1.5), 9)
    assert Row("guard", "%", found, goal=1.0).cells() == [
        "guard", "0.50 %", "0.40 to 1.20", "0.10 to 1.50", "9", "<= 1 %", "yes",
    ]  # fmt: skip
    assert Row("guard", "%", found, goal=0.4).cells()[-2:] == ["<= 0.4 %", "no"]
    assert Row("guard", "%", found).cells()[-3:] == ["9", "", ""]
