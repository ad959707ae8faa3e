"""The page of one run, or of several: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from cnn.report import comparison_page, run_page
from cnn.report.elements import document, element
from cnn.report.runs import Run


def report_page(runs: Sequence[Run], now: datetime | None = None) -> str:
    """The HTML of a report.

    Args:
      runs: one, or several to compare.
      now: the time that the page names.
    """
    style = resources.files("cnn.report").joinpath("style.css").read_text(encoding="utf-8")
    if len(runs) == 1:
        title, sections = run_page.title(runs[0]), run_page.run_sections(runs[0])
    else:
        title = comparison_page.title(runs)
        sections = comparison_page.comparison_sections(runs)
    time = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    footer = element("footer", f"Written by python -m cnn report on {time}.")
    return document(title, style, *sections, footer)


def report_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of a report, as JSON values."""
    if len(runs) > 1:
        return comparison_page.comparison_figures(runs)
    found = runs[0].evaluation
    return {**runs[0].summary(), "evaluation": found and found.figures}
