import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn import UserError
from cnn.metrics import METRICS, Metrics, find_metrics, top5_accuracy


def test_constant_logits_have_the_metrics_one_computes_by_hand():
    # Class 2 always wins by 1 over four others at 0: p(2) = e / (e + 4), p(other) = 1 / (e + 4).
    logits = jnp.tile(jnp.array([0.0, 0.0, 1.0, 0.0, 0.0]), (6, 1))
    labels = jnp.array([2, 0, 2, 4, 2, 1])
    log_partition = math.log(math.e + 4)
    losses = log_partition - (labels == 2)
    metrics = Metrics.from_logits(losses, logits, labels)
    assert (float(metrics.sums["accuracy"]), int(metrics.count)) == (3, 6)
    assert float(metrics.accuracy) == 0.5
    assert float(metrics.loss) == pytest.approx(log_partition - 0.5, rel=1e-6)


def test_masked_examples_count_nowhere_even_when_they_are_nan():
    losses = jnp.array([1.0, 2.0, jnp.nan])
    metrics = Metrics.from_logits(losses, jnp.eye(3), jnp.arange(3), jnp.array([True, True, False]))
    assert (float(metrics.sums["loss"]), int(metrics.sums["accuracy"]), int(metrics.count)) == (
        3.0,
        2,
        2,
    )


def test_total_is_exact_where_float32_would_round():
    one_more = Metrics({"loss": np.float32(1.0)}, np.int32(2**30))
    large = Metrics({"loss": np.float32(2.0**25)}, np.int32(2**30))
    summed = Metrics.merge([large, one_more, one_more])
    assert (summed.sums["loss"], summed.count) == (2.0**25 + 2, 3 * 2**30)


def test_cutting_a_run_into_other_pieces_gives_the_same_bits():
    rng = np.random.default_rng(0)
    parts = [Metrics({"loss": x}, np.int32(2)) for x in rng.random(50).astype(np.float32)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[20:])
    in_two = Metrics.merge([Metrics.merge(parts[:20]), stacked])
    assert in_two == Metrics.merge(parts)


def test_top5_is_the_rank_of_the_label():
    logits = jnp.tile(jnp.arange(10.0), (10, 1))
    assert top5_accuracy(logits, jnp.arange(10)).tolist() == 5 * [False] + 5 * [True]
    assert top5_accuracy(jnp.zeros((1, 10)), jnp.array([9])).tolist() == [True]


def test_metrics_are_summed_by_name():
    logits, labels = jnp.tile(jnp.arange(10.0), (2, 1)), jnp.array([9, 5])
    chosen = find_metrics(("accuracy", "top5_accuracy"))
    metrics = Metrics.from_logits(jnp.ones(2), logits, labels, metric_fns=chosen)
    assert {name: float(value) for name, value in metrics.means().items()} == {
        "loss": 1.0, "accuracy": 0.5, "top5_accuracy": 1.0
    }  # fmt: skip
    assert [fn.__name__ for fn in METRICS.values()] == list(METRICS)
    with pytest.raises(UserError, match=r"the metric mean must return a number for each image"):
        Metrics.from_logits(jnp.ones(2), logits, labels, metric_fns=(mean,))


def mean(logits, labels):
    return logits.mean()


def test_older_metrics_merge_with_more_of_them():
    old, new = Metrics({"loss": 1.0}, 1), Metrics({"loss": 2.0, "accuracy": 1.0}, 1)
    assert Metrics.merge([old, new]) == Metrics({"loss": 3.0, "accuracy": 1.0}, 2)


@pytest.mark.parametrize(
    "metric_fns", [(lambda *_: 0, lambda *_: 1), (functools.partial(mean),), (mean, mean)]
)
def test_a_metric_needs_a_name_of_its_own(metric_fns):
    with pytest.raises(UserError, match="metrics need names of their own"):
        Metrics.from_logits(jnp.ones(2), jnp.ones((2, 3)), jnp.zeros(2, int), metric_fns=metric_fns)


def test_no_class_is_among_the_top_five():
    logits = jnp.zeros((3, 10)).at[2].set(jnp.nan)
    assert top5_accuracy(logits, jnp.array([-1, 10, 0])).tolist() == 3 * [False]
