"""Figures and config values as the texts of a report."""

from __future__ import annotations

import json
from typing import Any

from cnn.report.comparison import Group
from cnn.runtime import table
from cnn.statistics import Spread

MINUS = "\N{MINUS SIGN}"


def percent(fraction: float) -> str:
    """A fraction whose sign stays on its line.

    >>> percent(0.69567).split()
    ['69.57', '%']
    """
    return table.percent(fraction).replace(" ", "\N{NO-BREAK SPACE}")


def spread_text(accuracy: Spread) -> str:
    """Mean ± standard deviation, in per cent; the mean alone of one value.

    >>> from cnn.statistics import spread
    >>> spread_text(spread([0.49, 0.5, 0.51])).split()
    ['50.00', '±', '1.00', '%']
    """
    if accuracy.std is None:
        return percent(accuracy.mean)
    return f"{100 * accuracy.mean:.2f} ± {percent(accuracy.std)}"


def points(value: float) -> str:
    """A difference of accuracies, in percentage points.

    >>> points(-0.0123), points(0.0)
    ('−1.23', '+0.00')
    """
    return f"{100 * value:+.2f}".replace("-", MINUS)


def interval_text(interval: tuple[float, float]) -> str:
    """An interval of a difference, in percentage points."""
    return " to ".join(map(points, interval))


def p_text(value: float) -> str:
    """A p-value with two significant digits.

    >>> p_text(0.62512), p_text(1e-9)
    ('0.63', '< 0.0001')
    """
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def value_text(value: Any) -> str:
    """A config value as one reads it; a text without quotes.

    >>> value_text("cnn"), value_text(True), value_text([16, 32])
    ('cnn', 'true', '[16, 32]')
    """
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)


def setting_texts(group: Group) -> list[str]:
    """The settings that tell a group from the others."""
    return [f"{name} = {value_text(value)}" for name, value in group.settings.items()]
