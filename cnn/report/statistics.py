"""How sure a difference in accuracy is: over random seeds, and over test images.

The two answer different questions. Over seeds: would other seeds of the same two configs differ
like this? Over images: would these trained models differ like this on other images?
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """A sample of one figure, one value a seed.

    Attributes:
      count: of the values.
      mean: of the values.
      std: the sample standard deviation (n - 1); None of one value, which has none.
    """

    count: int
    mean: float
    std: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value.

    >>> spread([1.0, 2.0, 3.0])
    Spread(count=3, mean=2.0, std=1.0)
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), std)


def welch_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = _LEVEL
) -> tuple[float, float] | None:
    """The interval of mean(second) - mean(first) for samples of unequal variance.

    d ± t s with s² = v1 + v2, v = variance / n, and the t distribution with
    s⁴ / (v1² / (n1 - 1) + v2² / (n2 - 1)) degrees of freedom (Welch 1947, "The generalization of
    'Student's' problem when several different population variances are involved", Biometrika 34).

    Args:
      first: one value a seed.
      second: one value a seed; other seeds than those of `first`, or not: they are not paired.
      level: the confidence, between 0 and 1.

    Returns:
      The lower and the upper end. None if a sample has one value only, as nothing is then known of
      how it varies.

    >>> low, high = welch_interval([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    >>> round(low, 3), round(high, 3)
    (-0.267, 4.267)
    """
    if min(len(first), len(second)) < 2:
        return None
    difference = statistics.fmean(second) - statistics.fmean(first)
    parts = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    if not (total := sum(parts)):  # all values of each sample are equal
        return difference, difference
    sizes = (len(first), len(second))
    # v1² and v2² alone may underflow, their shares of the sum do not.
    shares = [(part / total) ** 2 / (n - 1) for part, n in zip(parts, sizes, strict=True)]
    radius = float(stats.t.ppf((1 + level) / 2, 1 / sum(shares))) * math.sqrt(total)
    return difference - radius, difference + radius


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference in accuracy on the same images, second minus first.

    Attributes:
      count: the images.
      difference: of the accuracies.
      interval: its 95 % interval over images.
    """

    count: int
    difference: float
    interval: tuple[float, float]


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, level: float = _LEVEL
) -> PairedDifference:
    """The difference in accuracy with an interval from the differences of the single images.

    It is the normal interval after 1/2 was added to each of the four counts (both right, first
    only, second only, both wrong), by Agresti & Min 2005, "Simple improved confidence intervals
    for comparing matched proportions", Statistics in Medicine 24. Without that, models that never
    disagree would have an interval of width 0. Fractions between 0 and 1 enter with their own
    differences, which for 0 and 1 is the same formula.

    Args:
      first: `[N]`, how often each image was classified correctly, as a fraction of the seeds; or
        bool for one model.
      second: `[N]`, of the same images in the same order.
      level: the confidence, between 0 and 1.

    >>> found = paired_difference(np.array([1, 1, 0, 0]), np.array([1, 1, 1, 0]))
    >>> found.difference, [round(end, 3) for end in found.interval]
    (0.25, [-0.276, 0.609])
    """
    delta = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    number = len(delta) + 2
    centre = float(delta.sum()) / number
    variance = (float((delta**2).sum()) + 1) / number - centre**2
    radius = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance / number)
    interval = max(centre - radius, -1.0), min(centre + radius, 1.0)
    return PairedDifference(len(delta), float(delta.mean()), interval)


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """The images that only one of two models classifies correctly.

    Attributes:
      only_first: the images that only the first gets right.
      only_second: the images that only the second gets right.
      p_value: of McNemar's exact test.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> Disagreement:
    """Tests whether two models that disagree are equally often right.

    The p-value is that of the two-sided exact binomial test with probability 1/2 on the images that
    exactly one model gets right (McNemar 1947, "Note on the sampling error of the difference
    between correlated proportions or percentages", Psychometrika 12; in its exact form).

    Args:
      first: `bool[N]`, whether the first model is right.
      second: `bool[N]`, of the same images.

    >>> mcnemar(np.array([True, False, False, False]), np.array([False, True, True, True]))
    Disagreement(only_first=1, only_second=3, p_value=0.625)
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total = only_first + only_second
    p_value = float(stats.binomtest(only_first, total).pvalue) if total else 1.0
    return Disagreement(only_first, only_second, p_value)
