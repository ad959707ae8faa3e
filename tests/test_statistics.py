"""The statistics of a comparison, against values computed by hand or by another library."""

import math

import numpy as np
import pytest
from scipy import stats

from cnn.statistics import mcnemar, paired_difference, spread, welch_interval


def test_spread_is_mean_and_sample_deviation():
    found = spread([0.90, 0.92, 0.97])
    assert found.mean == pytest.approx(0.93)
    # Deviations -3, -1, 4 hundredths: (9 + 1 + 16) / 2 = 13.
    assert found.std == pytest.approx(math.sqrt(13) / 100)


def test_one_value_has_no_spread():
    assert spread([0.5]).std is None


def test_welch_interval_by_hand():
    # Means 2 and 6; variances 1 and 4; v = 1/3 and 4/3, their sum 5/3.
    # Degrees of freedom (5/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2) = 25 / 8.5; t(0.975, 2.941) = 3.2180.
    low, high = welch_interval([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    radius = 3.2180 * math.sqrt(5 / 3)
    assert (low, high) == pytest.approx((4 - radius, 4 + radius), abs=2e-3)


def test_welch_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.9, 0.01, 5), rng.normal(0.92, 0.03, 8)
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    found = welch_interval(first.tolist(), second.tolist())
    assert found == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("first", "second"), [([0.9], [0.8, 0.7]), ([0.9, 0.8], [0.7])])
def test_one_seed_gives_no_interval(first, second):
    assert welch_interval(first, second) is None


def test_welch_interval_of_equal_values_is_a_point():
    assert welch_interval([0.5, 0.5], [0.75, 0.75]) == (0.25, 0.25)


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


def test_mcnemar_of_models_that_agree():
    assert mcnemar(*right(5, 0, 0, 5)).p_value == 1.0
