"""Confidence intervals of what a run measures."""

from __future__ import annotations

import math
import statistics


def wilson_interval(correct: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, "Probable inference").

    For one model on images drawn independently: it says nothing on what other seeds would give.

    Args:
      correct: images that were predicted right.
      count: images that were tested, at least one.
      level: of confidence, between 0 and 1.

    Returns:
      The lower and the upper end, fractions from 0 to 1.

    >>> low, high = wilson_interval(6957, 10_000)
    >>> round(low, 4), round(high, 4)
    (0.6866, 0.7046)
    """
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    fraction = correct / count
    centre = fraction + z**2 / (2 * count)
    radius = z * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return max((centre - radius) / scale, 0.0), min((centre + radius) / scale, 1.0)
