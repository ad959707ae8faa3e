"""The page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from cnn.report.comparison import Comparison, Group, Pair, compare, differing, group_runs, values_of
from cnn.report.elements import Child, element, figure, section, table
from cnn.report.figures import Curve, curve_panel, interval_panel, is_fraction
from cnn.report.runs import Run
from cnn.report.texts import (
    MINUS,
    interval_text,
    p_text,
    percent,
    points,
    setting_texts,
    spread_text,
    value_text,
)
from cnn.runtime.environment import changes
from cnn.runtime.progress import format_duration
from cnn.runtime.table import epoch_number, loss
from cnn.statistics import PairedDifference


def comparison_sections(runs: Sequence[Run]) -> list[Child]:
    """What the page says, from the title on."""
    groups = group_runs(runs)
    comparisons = [compare(groups[0], group) for group in groups[1:]]
    names = labels(runs)
    sections: list[Child] = [_header(runs, groups), section("Groups", _group_table(groups))]
    if comparisons:
        sections.append(section("Differences in test accuracy", *_differences(comparisons, names)))
    return [
        *sections,
        section("Curves", _curves(groups)),
        section("Runs", _run_table(groups, names)),
        section("Config fields that differ", _fields(groups, names)),
        section("Environments", _environments(runs, names)),
    ]


def title(runs: Sequence[Run]) -> str:
    """Names the comparison."""
    return f"{len(runs)} runs compared"


def labels(runs: Sequence[Run]) -> dict[Run, str]:
    """The shortest ends of the runs' paths that tell them apart."""
    parts = [run.path.parts for run in runs]
    size = 1
    while len({path[-size:] for path in parts}) < len(parts):
        size += 1
    return {run: os.sep.join(path[-size:]) for run, path in zip(runs, parts, strict=True)}


def _header(runs: Sequence[Run], groups: Sequence[Group]) -> Element:
    data = {run.dataset["name"]: None for run in runs if run.dataset}
    on = f" on {', '.join(data)}" if data else ""
    text = (
        f"{len(groups)} group{'s' * (len(groups) != 1)} of runs{on}; the runs of a group differ in "
    )
    unfinished = [run.path.name for run in runs if run.status != "finished"]
    notices = []
    if unfinished:
        notice = (
            f"Not finished: {', '.join(unfinished)}. Their figures are those after their last "
            f"epoch so far, and all that follows counts them as they are."
        )
        notices.append(element("p", notice, class_="notice"))
    return element(
        "header",
        element("p", "Comparison", class_="kicker"),
        element("h1", title(runs)),
        element("p", f"{text}their random seeds only", class_="subtitle"),
        *notices,
    )


def _group_table(groups: Sequence[Group]) -> Element:
    rows = [
        (
            group.letter,
            _settings(group),
            f"{len(group.runs)}",
            ", ".join(str(run.config["seed"]) for run in group.runs),
            spread_text(group.accuracy),
            percent(max(run.best["test_accuracy"] for run in group.runs)),
        )
        for group in groups
    ]
    header = ("group", "settings", "n", "seeds", "test accuracy", "best epoch of all")
    caption = "Mean test accuracy after the last epoch ± one sample standard deviation over n seeds"
    if any(len(group.runs) == 1 for group in groups):
        caption += "; a group of one run has none"
    return table(header, rows, caption=caption, numbers=(2, 4, 5))


def _settings(group: Group) -> Element:
    lines = [element("code", text, class_="line") for text in setting_texts(group)]
    return element("div", *lines or ["all the same"])


def _differences(comparisons: Sequence[Comparison], names: dict[Run, str]) -> list[Child]:
    first = comparisons[0].first
    rows = [
        (
            f"{c.second.letter} {MINUS} {c.first.letter}",
            *_difference_cells(c),
        )
        for c in comparisons
    ]
    header = ("difference", "means", "95 % over seeds", "on the same images", "95 % over images")
    summary = table(
        header,
        rows,
        caption=f"Test accuracy minus that of group {first.letter}, in percentage points",
        numbers=range(1, 5),
    )
    return [
        summary,
        *_drawing(comparisons),
        *_explained([c for c in comparisons if c.means is not None]),
        *_different_images(comparisons),
        *_pair_table(comparisons, names),
        *_missing(comparisons, names),
    ]


def _difference_cells(found: Comparison) -> tuple[str, str, str, str]:
    if found.means is None:
        return "none: different images", "", "", ""
    return (
        points(found.means.difference),
        interval_text(found.means.interval) if found.means.interval else "none: n = 1",
        points(found.images.difference) if found.images else "",
        interval_text(found.images.interval) if found.images else "no predictions",
    )


def _drawing(comparisons: Sequence[Comparison]) -> list[Element]:
    rows: list[tuple[str, float, tuple[float, float] | None]] = []
    for c in comparisons:
        name = f"{c.second.letter} {MINUS} {c.first.letter}"
        if c.means is not None and c.means.interval is not None:
            rows.append((f"{name}, seeds", c.means.difference, c.means.interval))
        if c.images is not None:
            rows.append((f"{name}, images", c.images.difference, c.images.interval))
    if not rows:
        return []
    alt = "; ".join(f"{n}: {points(v)}, {interval_text(i)}" for n, v, i in rows if i)
    panel = interval_panel(rows, alt, label="difference in test accuracy (percentage points)")
    caption = (
        "Differences with their 95 % intervals. An interval that crosses 0 leaves the sign open."
    )
    return [figure(caption, element("div", panel, class_="single"))]


def _different_images(comparisons: Sequence[Comparison]) -> list[Element]:
    others = [c.second.letter for c in comparisons if c.means is None]
    if not others:
        return []
    text = (
        f"Tested on different images than group {comparisons[0].first.letter}: "
        f"{', '.join(others)}. Accuracies on different images are no measure of which config is "
        f"better, so no difference is given."
    )
    return [element("p", text, class_="notice")]


def _explained(comparisons: Sequence[Comparison]) -> list[Element]:
    if not comparisons:
        return []
    text = (
        "The interval over seeds says how the difference of the means would vary with other random "
        "seeds, on the same test images (Welch's t interval, unequal variances). "
    )
    if any(c.means and c.means.interval is None for c in comparisons):
        text += "A group with one run gives none: nothing is known of how it varies. "
    if any(c.images for c in comparisons):
        text += (
            "The interval over images says how the difference of these trained models would vary "
            "with other test images; it comes from the differences image by image, averaged over "
            "the runs of a group (adjusted normal interval, Agresti & Min 2005), and says nothing "
            "of other seeds."
        )
    return [element("p", text)]


def _pair_table(comparisons: Sequence[Comparison], names: dict[Run, str]) -> list[Element]:
    pairs = [pair for c in comparisons for pair in c.pairs]
    if not pairs:
        return []
    rows = [
        (
            names[pair.second],
            names[pair.first],
            points(pair.difference.difference),
            interval_text(pair.difference.interval),
            f"{pair.disagreement.only_second:,}",
            f"{pair.disagreement.only_first:,}",
            p_text(pair.disagreement.p_value),
        )
        for pair in pairs
    ]
    letter = comparisons[0].first.letter
    header = ("run", f"minus run of {letter}", "difference", "95 % over images", "only run right",
              f"only run of {letter} right", "McNemar p")  # fmt: skip
    first = pairs[0].difference.count
    same = all(pair.difference.count == first for pair in pairs)
    images = f", {first:,} images" if same else ""
    caption = (
        f"Pairs of runs image by image{images}; differences in percentage points, p of McNemar's "
        f"exact test"
    )
    return [table(header, rows, caption=caption, numbers=range(2, 7))]


def _missing(comparisons: Sequence[Comparison], names: dict[Run, str]) -> list[Element]:
    comparisons = [c for c in comparisons if c.means is not None]
    runs = {run: None for c in comparisons for group in (c.first, c.second) for run in group.runs}
    without = [names[run] for run in runs if run.current_evaluation is None]
    found = []
    if without:
        text = f"No predictions of the last state: {', '.join(without)}. "
        command = element("code", "python -m cnn evaluate RUN")
        found.append(element("p", text, command, " makes them.", class_="notice"))
    others = [c.second.letter for c in comparisons if c.images is None and not without]
    if others:
        text = f"Predictions of other images than those of the first group: {', '.join(others)}."
        found.append(element("p", text, class_="notice"))
    return found


def _curves(groups: Sequence[Group]) -> Element:
    names: dict[str, None] = {}
    for group in groups:
        for run in group.runs:
            numbers = {n for n, v in run.last.items() if isinstance(v, int | float)}
            names |= {
                n: None for n in run.last if n in numbers and n.startswith(("test_", "train_"))
            }
    names.pop("test_count", None)
    panels = []
    for name in sorted(names, key=lambda n: (not n.startswith("test_"), n.endswith("_loss"))):
        part, _, metric = name.partition("_")
        curves = [c for c in (_curve(group, name) for group in groups) if c.epochs]
        ends = [f"{c.legend} ends at {_end(metric, c)}" for c in curves]
        alt = f"{part} {metric} against the epoch: {', '.join(ends)}"
        panels.append(curve_panel(metric, curves, alt, title=part))
    caption = (
        "Lines are means over the n runs of a group, bands are ± one sample standard deviation "
        "over them (none for n = 1), up to the last epoch that all runs of the group have."
    )
    return figure(caption, element("div", *panels, class_="panels"))


def _curve(group: Group, name: str) -> Curve:
    series = [{r["epoch"]: r[name] for r in run.records if name in r} for run in group.runs]
    epochs = [epoch for epoch in series[0] if all(epoch in one for one in series)]
    legend = f"{group.letter} (n = {len(group.runs)})"
    return Curve(legend, epochs, [[one[epoch] for epoch in epochs] for one in series])


def _end(metric: str, curve: Curve) -> str:
    mean = sum(values[-1] for values in curve.values) / len(curve.values)
    return percent(mean) if is_fraction(metric) else loss(mean)


def _run_table(groups: Sequence[Group], names: dict[Run, str]) -> Element:
    rows = []
    for group in groups:
        for run in group.runs:
            figures = run.summary()
            low, high = figures["test_accuracy_interval"]
            seconds = figures["wall_seconds"]
            test_loss = figures["test_loss"]
            rows.append(
                (
                    names[run],
                    group.letter,
                    f"{figures['seed']}",
                    epoch_number(figures["epoch"])
                    + (
                        ""
                        if run.status == "finished"
                        else f" of {epoch_number(figures['num_epochs'])}"
                    ),
                    percent(figures["test_accuracy"]),
                    f"{100 * low:.2f} to {100 * high:.2f}",
                    percent(figures["best_test_accuracy"]),
                    "" if test_loss is None else loss(test_loss),
                    "" if seconds is None else format_duration(seconds),
                )
            )
    header = ("run", "group", "seed", "epochs", "test accuracy", "95 % over images", "best",
              "test loss", "time")  # fmt: skip
    caption = "The runs; intervals are Wilson scores over the test images, for each trained model"
    return table(header, rows, caption=caption, numbers=range(2, 9))


def _fields(groups: Sequence[Group], names: dict[Run, str]) -> Element:
    runs = [run for group in groups for run in group.runs]
    fields = differing(runs)
    if not fields:
        return element("p", "None: the configs are the same.")
    values = {run: values_of(run) for run in runs}
    rows = [
        (
            names[run],
            *(element("code", value_text(values[run].get(name, "unset"))) for name in fields),
        )
        for run in runs
    ]
    caption = (
        "Fields of runtime say where and how a run is computed, and make no group of their own"
    )
    has_runtime = any(name.startswith("runtime.") for name in fields)
    return table(("run", *fields), rows, caption=caption if has_runtime else "")


def _environments(runs: Sequence[Run], names: dict[Run, str]) -> Element:
    known = [run for run in runs if run.environments]
    unknown = [names[run] for run in runs if not run.environments]
    items = [f"{name}: the environment was not recorded" for name in unknown]
    if known:
        base = known[0].environments[-1]
        for run in known:
            parts = len(run.environments)
            text = "; ".join(changes(base, run.environments[-1]))
            several = f"was trained in {parts} environments" if parts > 1 else ""
            if notes := "; ".join(filter(None, (several, text))):
                items.append(f"{names[run]}: {notes}")
    if not items:
        return element(
            "p", "All runs were trained with the same versions, devices, settings and commit."
        )
    intro = f"Compared with {names[known[0]]}:" if known else "They are not known:"
    items_html = [element("li", item) for item in items]
    return element("div", element("p", intro), element("ul", *items_html))


def comparison_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page says, as JSON values."""
    groups = group_runs(runs)
    return {
        "runs": [run.summary() for run in runs],
        "groups": [group_figures(group) for group in groups],
        "comparisons": [difference_figures(compare(groups[0], group)) for group in groups[1:]],
    }


def group_figures(group: Group) -> dict[str, Any]:
    """The accuracy of a group, as JSON values."""
    accuracy = group.accuracy
    return {
        "group": group.letter,
        "runs": [str(run.path) for run in group.runs],
        "settings": group.settings,
        "count": accuracy.count,
        "mean_test_accuracy": accuracy.mean,
        "std_test_accuracy": accuracy.std,
        "interval_over_seeds": accuracy.interval and list(accuracy.interval),
    }


def difference_figures(found: Comparison) -> dict[str, Any]:
    """How two groups differ, as JSON values."""
    means = found.means
    return {
        "first": found.first.letter,
        "second": found.second.letter,
        "tested_on_same_images": found.same_data,
        "difference": means and means.difference,
        "interval_over_seeds": means and means.interval and list(means.interval),
        "p_value_over_seeds": means and means.p_value,
        "same_images": found.images and _image_figures(found.images),
        "pairs": [_pair_figures(pair) for pair in found.pairs],
    }


def _image_figures(found: PairedDifference) -> dict[str, Any]:
    return {
        "count": found.count,
        "difference": found.difference,
        "interval_over_images": list(found.interval),
    }


def _pair_figures(pair: Pair) -> dict[str, Any]:
    return {
        "first": str(pair.first.path),
        "second": str(pair.second.path),
        **_image_figures(pair.difference),
        "only_first_correct": pair.disagreement.only_first,
        "only_second_correct": pair.disagreement.only_second,
        "mcnemar_p_value": pair.disagreement.p_value,
    }
