"""Writes an HTML page about one run, or a comparison of several.

    python -m cnn report checkpoints/baseline
    python -m cnn report runs/a-0 runs/a-1 runs/b-0 runs/b-1 --output a-and-b.html

The page is one file, which needs neither a network nor JavaScript. Runs whose configs differ in
`seed` only form a group; groups are compared with that of the first run. Classes, calibration,
mistakes, and comparisons image by image need `python -m cnn evaluate RUN` first.
"""

from __future__ import annotations

import argparse

from cnn.commands.common import make_folder, output_file, print_json
from cnn.report.comparison import compare, group_runs
from cnn.report.page import report_figures, report_page
from cnn.report.runs import Run, read_runs
from cnn.report.texts import interval_text, points, setting_texts, spread_text
from cnn.results import options_text
from cnn.runtime.disk import atomic_write
from cnn.runtime.screen import log, shown, waiting
from cnn.runtime.table import epoch_number, percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run directories, such as checkpoints/baseline, or directories of groups of runs",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page (default: RUN/report.html; of several runs report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Reads the runs, writes the page and prints the figures."""
    runs = read_runs(arguments.runs)
    default = runs[0].path / "report.html" if len(runs) == 1 else "report.html"
    page = output_file(default if arguments.output is None else arguments.output, ".html", ".htm")
    with waiting("drawing the report"):
        html = report_page(runs)
    make_folder(page.parent)
    with atomic_write(page) as stream:
        stream.write(html.encode())
    if arguments.json:
        print_json({**report_figures(runs), "page": str(page)})
        return
    log("\n".join(_run_text(runs[0]) if len(runs) == 1 else _comparison_text(runs)))
    log(f"see {shown(page)}: open {page.as_uri()} in a browser")


def _run_text(run: Run) -> list[str]:
    figures = run.summary()
    low, high = figures["test_accuracy_interval"]
    state = "" if run.status == "finished" else f"; {run.status}, not finished"
    return [
        f"{shown(run.path)}: epoch {epoch_number(figures['epoch'])} of "
        f"{epoch_number(figures['num_epochs'])}{state}",
        f"  test accuracy: {percent(figures['test_accuracy'])} of {figures['test_count']:,} "
        f"images, 95 % interval {100 * low:.2f} to {percent(high)}",
        *(f"  {line}" for line in options_text(figures)),
    ]


def _comparison_text(runs: list[Run]) -> list[str]:
    first, *others = groups = group_runs(runs)
    lines = []
    for group in groups:
        settings = ", ".join(setting_texts(group)) or "all the same"
        accuracy = f"{spread_text(group.accuracy)} (n = {len(group.runs)})"
        lines.append(f"{group.letter}: test accuracy {accuracy}; {settings}")
    for group in others:
        found = compare(first, group)
        name = f"{group.letter} - {first.letter}"
        if found.means is None:
            lines.append(
                f"{name}: not compared, as {group.letter} and {first.letter} were tested on "
                f"different images"
            )
            continue
        seeds = (
            f"{interval_text(interval)} over seeds" if (interval := found.means.interval) else ""
        )
        images = f"{interval_text(found.images.interval)} over images" if found.images else ""
        known = "; ".join(filter(None, (seeds, images))) or "no interval: one run in a group"
        lines.append(f"{name}: {points(found.means.difference)} percentage points; 95 %: {known}")
    return lines
