"""How sure a difference in accuracy is: over random seeds, and over test images.

The two answer different questions. Over seeds: would other seeds of the same two configs differ
like this? Over images: would these trained models differ like this on other images?
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from cnn.errors import UserError

LEVEL = 0.95
POWER = 0.8
_LEAST_RATIO = 1e-3  # of a difference to a standard deviation: 16 million seeds
_MOST = 0.9999  # of a probability: sums are never 1 exactly
_MOST_TERMS = 1e5


@dataclasses.dataclass(frozen=True)
class Spread:
    """A sample of one figure, one value a seed.

    Attributes:
      count: of the values.
      mean: of the values.
      std: the sample standard deviation (n - 1); None of one value, which has none.
      interval: the confidence interval of the mean; None of one value.
    """

    count: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None


def spread(values: Sequence[float], *, level: float = LEVEL) -> Spread:
    """Mean, sample standard deviation, and how sure the mean is.

    The interval is mean ± t std / √n, with the t distribution of n - 1 degrees of freedom (Student
    1908, "The probable error of a mean", Biometrika 6).

    Args:
      values: at least one. With one that is NaN or infinite, `std` and `interval` are NaN.
      level: the confidence of the interval, between 0 and 1.

    >>> found = spread([1.0, 2.0, 3.0])
    >>> found.mean, found.std, [round(end, 3) for end in found.interval]
    (2.0, 1.0, [-0.484, 4.484])
    """
    count, is_finite = len(values), all(map(math.isfinite, values))
    # The exact mean, so that the means of equal values are equal; it knows finite values only.
    mean = statistics.mean(values) if is_finite else float(np.sum(values)) / count
    if count == 1:
        return Spread(count, mean, std=None, interval=None)
    std = statistics.stdev(values) if is_finite else math.nan
    radius = _t_quantile(level, count - 1) * std / math.sqrt(count)
    return Spread(count, mean, std, (mean - radius, mean + radius))


def pooled_std(*samples: Spread) -> float | None:
    """The standard deviation within samples: the root of the mean variance by degrees of freedom.

    None if all are of one value.

    >>> pooled_std(spread([1.0, 2.0, 3.0]), spread([5.0]))
    1.0
    """
    known = [(sample.count - 1, sample.std) for sample in samples if sample.std is not None]
    if not known:
        return None
    return math.sqrt(sum(freedom * std**2 for freedom, std in known) / sum(f for f, _ in known))


def _t_quantile(level: float, freedom: float) -> float:
    """The value that |t| exceeds with probability 1 - level."""
    from scipy import special  # a part of a second, which most programs here need not wait

    return float(special.stdtrit(freedom, (1 + level) / 2))


@dataclasses.dataclass(frozen=True)
class MeanDifference:
    """The difference of the means of two samples, second minus first.

    Attributes:
      difference: of the means.
      interval: its confidence interval; None if a sample has one value only, as nothing is then
        known of how it varies.
      p_value: two-sided, of the hypothesis that there is no difference; None likewise.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None


def welch_test(
    first: Sequence[float], second: Sequence[float], *, level: float = LEVEL
) -> MeanDifference:
    """Compares the means of two samples of unequal variance.

    The interval is d ± t s with s² = v1 + v2, v = variance / n, and the t distribution with
    s⁴ / (v1² / (n1 - 1) + v2² / (n2 - 1)) degrees of freedom; the p-value is that of d / s (Welch
    1947, "The generalization of 'Student's' problem when several different population variances are
    involved", Biometrika 34). Where all values of each sample are equal, the interval is the point
    d, and p is 0, or 1 if d is 0.

    Args:
      first: one value a seed.
      second: one value a seed; other seeds than those of `first`, or not: they are not paired.
      level: the confidence of the interval, between 0 and 1.

    >>> found = welch_test([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    >>> found.difference, [round(end, 3) for end in found.interval], round(found.p_value, 3)
    (2.0, [-0.267, 4.267], 0.07)
    """
    from scipy import special

    samples = [spread(sample) for sample in (first, second)]
    difference = samples[1].mean - samples[0].mean
    known = [(sample.count, sample.std) for sample in samples if sample.std is not None]
    if len(known) < 2:
        return MeanDifference(difference, interval=None, p_value=None)
    parts = [std**2 / count for count, std in known]
    if not (total := sum(parts)):
        return MeanDifference(difference, (difference, difference), float(difference == 0))
    # v1² and v2² alone may underflow, their shares of the sum do not.
    freedom = 1 / sum((v / total) ** 2 / (n - 1) for v, (n, _) in zip(parts, known, strict=True))
    error = math.sqrt(total)
    radius = _t_quantile(level, freedom) * error
    p_value = 2 * float(special.stdtr(freedom, -abs(difference) / error))
    return MeanDifference(difference, (difference - radius, difference + radius), p_value)


def seeds_needed(
    std: float, difference: float, *, power: float = POWER, level: float = LEVEL
) -> int:
    """How many seeds of each of two configs a test needs to find a difference of their means.

    It is the least n for which the two-sided t test of two samples of n finds a true difference
    with probability `power`; the power is exact for normal values of one standard deviation (see
    `_power`; Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", chapter 2). That
    is Student's test; Welch's, which does not suppose equal variances, needs at most one more.

    Args:
      std: over the seeds of one config. Estimated from few seeds it is a rough figure, and so is
        the result, which grows with its square.
      difference: of the means, in the same unit.
      power: with which the difference is to be found, between 0 and 1.
      level: 1 minus the probability to find a difference where there is none.

    Raises:
      UserError: `difference` is not positive, or less than a thousandth of `std`; `std` is
        negative; `power` or `level` is not between 0 and 0.9999; an argument is NaN or infinite.

    >>> seeds_needed(std=1.0, difference=0.5)  # Cohen's table 2.4.1
    64
    """
    _check_power(std, difference, power, level)
    if not std:
        return 2

    def found(count: int) -> float:
        return _power(difference / std * math.sqrt(count / 2), 2 * count - 2, level)

    most = 2
    while found(most) < power:
        most *= 2
    return bisect.bisect_left(range(most + 1), power, lo=2, key=found)


def detectable_difference(
    std: float, count: int, *, power: float = POWER, level: float = LEVEL
) -> float:
    """The least difference of means for which `count` seeds of each config suffice.

    The inverse of `seeds_needed`, with its other arguments, unit and errors. 0 if `power` is not
    more than what chance gives, 1 - level.

    Args:
      std: over the seeds of one config.
      count: 2 or more.
      power: with which the difference is to be found.
      level: 1 minus the probability to find a difference where there is none.

    >>> round(detectable_difference(std=1.0, count=64), 3)
    0.499
    """
    if count < 2:
        raise UserError(f"count={count} must be 2 or more: one seed does not show how seeds vary")
    _check_power(std, max(std, 1.0), power, level)

    def found(shift: float) -> float:
        return _power(shift, 2 * count - 2, level)

    low, high = 0.0, 1.0
    while found(high) < power:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return 0.0 if power <= 1 - level else std * high * math.sqrt(2 / count)


def _check_power(std: float, difference: float, power: float, level: float) -> None:
    if not (0 < difference < math.inf and 0 <= std < math.inf):
        raise UserError(
            f"difference={difference} and std={std} must be finite, the difference more than 0 and "
            f"the standard deviation 0 or more"
        )
    if difference < std * _LEAST_RATIO:
        raise UserError(
            f"difference={difference} is too small to be shown: the standard deviation is {std}"
        )
    if not (0 < power <= _MOST and 0 < level <= _MOST):
        raise UserError(f"power={power} and level={level} must be more than 0, and {_MOST} or less")


def _power(shift: float, freedom: int, level: float) -> float:
    """The probability that |T| exceeds the two-sided critical value, T being noncentral t.

    T² has the noncentral F distribution with 1 and `freedom` degrees of freedom. Its probabilities
    are those of beta distributions, weighted by a Poisson distribution with mean shift² / 2
    (Johnson, Kotz & Balakrishnan 1995, "Continuous Univariate Distributions", volume 2, chapter
    30). All terms are positive; those beyond 12 standard deviations of the weights are left out.

    Args:
      shift: the noncentrality, 0 or more.
      freedom: degrees of freedom.
      level: of the test.
    """
    from scipy import special

    critical = _t_quantile(level, freedom)
    mean = min(shift**2 / 2, (_MOST_TERMS / 24) ** 2)  # beyond, the power is 1 for all that matters
    width = 12 * math.sqrt(mean) + 40
    order = np.arange(max(0, int(mean - width)), int(mean + width))
    weights = np.exp(special.xlogy(order, mean) - mean - special.gammaln(order + 1))
    tails = special.betaincc(order + 0.5, freedom / 2, critical**2 / (critical**2 + freedom))
    return float(weights @ tails)


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
    first: np.ndarray, second: np.ndarray, *, level: float = LEVEL
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
    from scipy import special

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    fewer, more = sorted((only_first, only_second))
    # The binomial sum up to `fewer`, as an incomplete beta function.
    p_value = 1.0 if fewer == more else min(2 * float(special.betainc(more, fewer + 1, 0.5)), 1.0)
    return Disagreement(only_first, only_second, p_value)
