"""The statistics of a comparison, against values computed by hand or by another library."""

import functools
import math

import numpy as np
import pytest
from scipy import stats

from cnn import UserError
from cnn.statistics import (
    detectable_difference,
    mcnemar,
    paired_difference,
    pooled_std,
    seeds_needed,
    spread,
    welch_test,
)

close = functools.partial(pytest.approx, rel=1e-12)


def test_spread_is_mean_and_sample_deviation():
    found = spread([0.90, 0.92, 0.97])
    assert found.mean == pytest.approx(0.93)
    # Deviations -3, -1, 4 hundredths: (9 + 1 + 16) / 2 = 13.
    assert found.std == pytest.approx(math.sqrt(13) / 100)


@pytest.mark.parametrize("count", [2, 3, 30])
def test_interval_of_a_mean_is_that_of_scipy(count):
    values = np.random.default_rng(count).normal(0.9, 0.01, count)
    expected = stats.t.interval(0.9, count - 1, values.mean(), stats.sem(values))
    assert spread(values.tolist(), level=0.9).interval == close(expected)


def test_one_value_has_no_spread():
    assert (spread([0.5]).std, spread([0.5]).interval) == (None, None)


def test_equal_values_have_no_width():
    assert spread([0.1] * 3).std == 0
    assert spread([0.1] * 3).interval == (0.1, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_spread_with_a_loss_that_is_not_finite(bad):
    found = spread([1.0, bad])
    assert math.isnan(found.std)
    assert all(map(math.isnan, found.interval))
    assert not math.isfinite(found.mean)


def test_pooled_std_is_that_of_students_test():
    a, b = [0.1, 0.2, 0.4], [0.3, 0.9]
    expected = (stats.ttest_ind(b, a).statistic / (np.mean(b) - np.mean(a))) ** -1
    assert pooled_std(spread(a), spread(b)) == close(expected / math.sqrt(1 / 3 + 1 / 2))
    assert pooled_std(spread(a), spread([0.5])) == close(spread(a).std)
    assert pooled_std(spread([0.4]), spread([0.5])) is None


def test_welch_test_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.9, 0.01, 5), rng.normal(0.92, 0.03, 8)
    expected = stats.ttest_ind(second, first, equal_var=False)
    found = welch_test(first.tolist(), second.tolist())
    assert found.difference == close(second.mean() - first.mean())
    assert found.interval == close(tuple(expected.confidence_interval(0.95)))
    assert found.p_value == close(expected.pvalue)


@pytest.mark.parametrize(("first", "second"), [([0.9], [0.8, 0.7]), ([0.9, 0.8], [0.7])])
def test_one_seed_gives_a_difference_without_interval(first, second):
    found = welch_test(first, second)
    assert found.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert (found.interval, found.p_value) == (None, None)


@pytest.mark.parametrize(("other", "p_value"), [(0.1, 1.0), (0.2, 0.0)])
def test_welch_interval_of_equal_values_is_a_point(other, p_value):
    """Also where the mean of floats would be rounded to another one."""
    found = welch_test([0.1] * 3, [other] * 2)
    assert found.interval == (other - 0.1, other - 0.1)
    assert found.p_value == p_value


def test_intervals_over_seeds_cover_the_truth():
    """In 95 % of the samples, give or take 4 standard errors of 1,500 samples."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0.9, 0.01, (1500, 4)), rng.normal(0.92, 0.03, (1500, 5))
    means = [spread(sample).interval for sample in samples[0].tolist()]
    differences = [
        welch_test(*pair).interval for pair in zip(*(s.tolist() for s in samples), strict=True)
    ]
    for found, truth in ((means, 0.9), (differences, 0.02)):
        low, high = np.transpose(found)
        assert abs(((low <= truth) & (truth <= high)).mean() - 0.95) < 0.0225


@pytest.mark.parametrize(
    ("ratio", "power", "level", "count"),
    # Cohen 1988, table 2.4.1: two-sided 5 % and 1 %. Of 0.2 he has 393, by an approximation.
    [
        (0.2, 0.8, 0.95, 394),
        (0.5, 0.8, 0.95, 64),
        (0.8, 0.8, 0.95, 26),
        (1.0, 0.8, 0.95, 17),
        (0.5, 0.95, 0.95, 105),
        (0.5, 0.8, 0.99, 96),
    ],
)
def test_seeds_needed_are_the_published_ones(ratio, power, level, count):
    assert seeds_needed(0.3, 0.3 * ratio, power=power, level=level) == count


@pytest.mark.parametrize("count", [2, 3, 5, 40, 2000])
@pytest.mark.parametrize(("power", "level"), [(0.8, 0.95), (0.06, 0.95), (0.99, 0.999)])
def test_detectable_difference_has_the_power(count, power, level):
    """By SciPy's noncentral t distribution."""
    found = detectable_difference(0.02, count, power=power, level=level)
    freedom, shift = 2 * count - 2, found / 0.02 * math.sqrt(count / 2)
    critical = stats.t.ppf((1 + level) / 2, freedom)
    above, below = stats.nct.sf(critical, freedom, shift), stats.nct.cdf(-critical, freedom, shift)
    assert above + np.nan_to_num(below) == close(power)  # NaN where it is 0
    needed = functools.partial(seeds_needed, 0.02, power=power, level=level)
    assert needed(found * (1 + 1e-9)) == count
    assert needed(found * (1 - 1e-9)) == count + 1


def test_welchs_test_needs_at_most_one_seed_more():
    rng = np.random.default_rng(0)
    for count in (2, 4):
        truth = detectable_difference(1.0, count)
        samples = rng.normal(size=(2, 20_000, count + 1))
        tested = stats.ttest_ind(samples[0] + truth, samples[1], axis=1, equal_var=False)
        assert (tested.pvalue < 0.05).mean() > 0.8


def test_power_without_a_spread():
    assert seeds_needed(0.0, 0.1) == 2
    assert seeds_needed(1e-9, 1.0) == 2
    assert detectable_difference(0.0, 5) == 0
    assert detectable_difference(0.1, 5, power=0.04) == 0  # chance suffices


@pytest.mark.parametrize(
    ("std", "difference", "options"),
    [
        (0.1, 0.0, {}),
        (0.1, math.nan, {}),
        (-0.1, 0.1, {}),
        (math.nan, 0.1, {}),
        (0.1, math.inf, {}),
        (0.1, 1e-9, {}),
        (0.1, 0.1, {"power": 1.0}),
        (0.1, 0.1, {"level": 0.0}),
    ],
)
def test_a_power_that_cannot_be_computed(std, difference, options):
    with pytest.raises(UserError, match=r"must be|too small"):
        seeds_needed(std, difference, **options)


def test_one_seed_detects_nothing():
    with pytest.raises(UserError, match="count=1 must be 2 or more"):
        detectable_difference(0.1, 1)


def right(*counts):
    """Whether each of two models is right: both, the first only, the second only, neither."""
    first = np.repeat([True, True, False, False], counts)
    second = np.repeat([True, False, True, False], counts)
    return first, second


def test_paired_difference_by_hand():
    # Agresti & Min: b = 10.5, c = 30.5, n = 102: the centre is 20 / 102, the variance
    # (41 - 400 / 102) / 102**2.
    found = paired_difference(*right(40, 10, 30, 20))
    radius = 1.959964 * math.sqrt(41 - 400 / 102) / 102
    assert found.count == 100
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((20 / 102 - radius, 20 / 102 + radius))


def test_models_that_agree_have_an_interval_of_some_width():
    low, high = paired_difference(*right(90, 0, 0, 10)).interval
    assert -0.03 < low < 0 < high < 0.03


def test_interval_stays_within_the_possible_differences():
    assert paired_difference(*right(0, 0, 2, 0)).interval[1] == 1.0


def test_fractions_of_seeds_are_compared_image_by_image():
    first, second = right(40, 10, 30, 20)
    same = paired_difference(first.astype(float), second.astype(float))
    assert same == paired_difference(first, second)
    half = paired_difference(np.full(8, 0.5), np.full(8, 1.0))
    # The sum of squares is 8 / 4, so the variance is (2 + 1) / 10 - 0.4**2 = 0.14.
    radius = 1.959964 * math.sqrt(0.14 / 10)
    assert half.interval == pytest.approx((0.4 - radius, 0.4 + radius))


def test_paired_interval_covers_the_truth():
    """In 95 % of the samples, give or take 4 standard errors of 2,000 samples."""
    rng = np.random.default_rng(0)
    truth = 0.12 - 0.08
    hits = 0
    for counts in rng.multinomial(300, [0.7, 0.08, 0.12, 0.10], size=2000):
        low, high = paired_difference(*right(*counts)).interval
        hits += low <= truth <= high
    assert abs(hits / 2000 - 0.95) < 0.02


def test_mcnemar_by_hand():
    # Of 6 images 1 is right for the first only: 2 * (C(6, 0) + C(6, 1)) / 2**6.
    found = mcnemar(*right(50, 1, 5, 7))
    assert (found.only_first, found.only_second) == (1, 5)
    assert found.p_value == pytest.approx(14 / 64)


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (4, 5), (90, 120), (480, 520), (4000, 4300)])
def test_mcnemar_is_the_binomial_test_of_scipy(lost, gained):
    found = mcnemar(*right(3, lost, gained, 2)).p_value
    assert found == close(stats.binomtest(lost, lost + gained).pvalue)
    assert mcnemar(*right(3, gained, lost, 2)).p_value == found <= 1


def test_mcnemar_of_models_that_agree():
    assert mcnemar(*right(5, 0, 0, 5)).p_value == 1.0
