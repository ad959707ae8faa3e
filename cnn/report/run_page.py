"""The page about one run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree.ElementTree import Element

from cnn.config import SECTIONS, flatten, used
from cnn.report.elements import Child, element, figure, png, section, table
from cnn.report.figures import Curve, curve_panel, is_fraction, reliability_panel
from cnn.report.runs import Evaluation, Run
from cnn.report.texts import percent, value_text
from cnn.results import options_text
from cnn.runtime.environment import changes
from cnn.runtime.progress import format_duration
from cnn.runtime.screen import shown
from cnn.runtime.table import epoch_number, loss
from cnn.scores import calibration, class_scores, confusion_matrix

_MOST_CLASSES = 20  # of a confusion matrix that is shown whole
_MOST_CONFUSED = 20  # pairs of classes, where it is not


def run_sections(run: Run) -> list[Child]:
    """What the page says, from the title on."""
    return [
        _header(run),
        _curves(run),
        *_evaluation(run),
        *_samples(run),
        section("Config", *_config(run)),
        section("Environment", *_environments(run)),
        section("Reproduce", *_commands(run)),
    ]


def title(run: Run) -> str:
    """Names the run."""
    return f"{run.path.name}: {_subject(run)}"


def _subject(run: Run) -> str:
    model = run.config.get("model", {})
    name = model.get("name") or model.get("object") or "a model"
    data = run.dataset["name"] if run.dataset else run.config.get("dataset", {}).get("name", "?")
    return f"{name} on {data}, seed {run.config['seed']}"


def _header(run: Run) -> Element:
    figures = run.summary()
    low, high = figures["test_accuracy_interval"]
    duration = figures["wall_seconds"]
    facts = {
        f"Best, epoch {epoch_number(figures['best_epoch'])}": percent(
            figures["best_test_accuracy"]
        ),
        "Test loss": _number(figures["test_loss"], loss),
        **dict(map(_split, options_text(figures))),
        "Train accuracy": _number(figures["train_accuracy"], percent),
        "Parameters": _number(figures["num_params"], "{:,}".format),
        "Steps": f"{figures['num_steps']:,}",
        "Seed": f"{figures['seed']}",
        "Time": _number(duration, format_duration),
    }
    if figures["skipped_steps"]:
        facts["Skipped steps"] = f"{figures['skipped_steps']:,}, as they were not finite"
    pairs = [element("div", element("dt", k), element("dd", v)) for k, v in facts.items() if v]
    header = element(
        "header",
        element("p", "Training run", class_="kicker"),
        element("h1", run.path.name),
        element("p", _subject(run), class_="subtitle"),
        *(element("p", text, class_="notice") for text in _notices(run)),
        element(
            "p",
            element("strong", percent(figures["test_accuracy"]), class_="headline"),
            element(
                "span",
                f"test accuracy on {figures['test_count']:,} images",
                element("br"),
                f"95 % interval {100 * low:.2f} to {percent(high)} (Wilson score, over images)",
            ),
            class_="lead",
        ),
        element("dl", *pairs, class_="facts"),
    )
    if figures["digest"]:
        text = element("code", figures["digest"])
        header.append(element("p", "Digest of the final state: ", text, class_="digest"))
    return header


def _split(line: str) -> tuple[str, str]:
    """A line of a result's text as a name and a value."""
    name, _, value = line.partition(": ")
    return name.capitalize(), value


def _number(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)


def _notices(run: Run) -> Iterator[str]:
    """What a reader must know before he trusts the figures."""
    epoch = f"epoch {epoch_number(run.last['epoch'])} of {epoch_number(run.num_epochs)}"
    if run.status == "running":
        yield (
            f"Not finished: {run.trainer} was training it when this page was written. The figures "
            f"are those after {epoch}."
        )
    elif run.status == "stopped":
        yield (
            f"Not finished: it was interrupted or killed. The figures are those after {epoch}; the "
            f"command of the run resumes it."
        )
    if len(run.starts) > 1:
        steps = ", ".join(f"{step:,}" for step in run.starts[1:])
        number = len(run.environments)
        where = "all in the same environment" if number == 1 else f"in {number} environments"
        yield f"It was trained by {len(run.starts)} processes, {where}: resumed at step {steps}."


def _curves(run: Run) -> Element:
    names = {
        name.partition("_")[2]: None
        for record in run.records
        for name, value in record.items()
        if name.startswith(("train_", "test_")) and isinstance(value, int | float)
    }
    names.pop("count", None)
    panels = []
    for name in sorted(names, key=lambda n: (n == "loss", not is_fraction(n))):
        curves = [c for c in (_curve(run, part, name) for part in ("train", "test")) if c.epochs]
        panels.append(curve_panel(name, curves, _described(name, curves)))
    smoothing = run.config.get("loss", {}).get("label_smoothing")
    caption = (
        "Train figures are means over the steps of an epoch, each before its update; test figures "
        "are of all test images after the epoch."
    )
    if isinstance(smoothing, float) and smoothing:
        caption += f" The train loss has label smoothing {smoothing:g}, the test loss has none."
    return section("Curves", figure(caption, element("div", *panels, class_="panels")))


def _curve(run: Run, part: str, name: str) -> Curve:
    known = [r for r in run.records if isinstance(r.get(f"{part}_{name}"), int | float)]
    return Curve(part, [r["epoch"] for r in known], [[r[f"{part}_{name}"] for r in known]])


def _described(name: str, curves: list[Curve]) -> str:
    """A text in place of the drawing."""
    show = percent if is_fraction(name) else loss
    ends = [f"{c.legend} from {show(c.values[0][0])} to {show(c.values[0][-1])}" for c in curves]
    return f"{name.replace('_', ' ')} against the epoch: {', '.join(ends)}"


def _evaluation(run: Run) -> list[Element]:
    found = run.evaluation
    if found is None:
        command = element("code", shlex.join(["python", "-m", "cnn", "evaluate", shown(run.path)]))
        text = "Classes, calibration and mistakes are not known yet: "
        return [section("Evaluation", element("p", text, command, " finds them."))]
    figures = found.figures
    notes = []
    if found is not run.current_evaluation:
        notes.append(
            element(
                "p",
                f"It is of step {figures['step']:,}, while the run is at step "
                f"{run.last['step']:,}: evaluate the run again.",
                class_="notice",
            )
        )
    tta = "" if figures["tta"] == "none" else f" with test-time augmentation ({figures['tta']})"
    text = (
        f"All {figures['count']:,} test images at step {figures['step']:,}{tta}: accuracy "
        f"{percent(figures['accuracy'])}, loss {loss(figures['loss'])}."
    )
    confusion = confusion_matrix(found.labels, found.predictions, len(found.class_names))
    sections = [
        section("Classes", *notes, element("p", text), _class_table(found, confusion)),
        section("Confusion", _confusion(found, confusion)),
        section("Calibration", _calibration(found)),
    ]
    if found.mistakes is not None:
        caption = "Each with the predicted class, its probability, and the true class."
        picture = png(found.mistakes, "test images that the model classified wrongly")
        sections.append(section("Most confident mistakes", figure(caption, picture)))
    return sections


def _class_table(found: Evaluation, confusion: Any) -> Element:
    scores = class_scores(confusion)
    rows = [
        (
            name,
            f"{int(confusion[index].sum()):,}",
            *(percent(float(values[index])) for values in scores.values()),
        )
        for index, name in enumerate(found.class_names)
    ]
    header = ("class", "images", "precision", "recall", "F1")
    caption = "Precision, recall and F1 of each class"
    return table(header, rows, caption=caption, numbers=range(1, 5))


def _confusion(found: Evaluation, confusion: Any) -> Element:
    names = found.class_names
    if len(names) > _MOST_CLASSES:
        pairs = [
            (int(confusion[true, predicted]), names[true], names[predicted])
            for true, predicted in zip(*confusion.nonzero(), strict=True)
            if true != predicted
        ]
        rows = [
            (true, predicted, f"{count:,}")
            for count, true, predicted in sorted(pairs, key=lambda p: -p[0])[:_MOST_CONFUSED]
        ]
        caption = "The pairs of classes that are confused most often"
        return table(
            ("true class", "predicted class", "images"), rows, caption=caption, numbers=[2]
        )
    rows = []
    for index, row in enumerate(confusion.tolist()):
        total = max(sum(row), 1)
        cells = [
            element("span", f"{count:,}" if count else "", style=f"--share:{count / total:.3f}")
            for count in row
        ]
        rows.append((names[index], *cells))
    made = table(
        ("", *names),
        rows,
        caption="Images by true class (rows) and predicted class (columns); the colour is the "
        "fraction of the true class",
        numbers=range(1, len(names) + 1),
    )
    made.set("class", "scroll confusion")
    return made


def _calibration(found: Evaluation) -> Element:
    bins = calibration(found.confidence, found.correct)
    error, mean = found.figures["calibration_error"], found.figures["mean_confidence"]
    caption = (
        f"The expected calibration error is {percent(error)} (15 bins of equal width; Guo et al. "
        f"2017): the mean over images of the distance between accuracy and confidence in their "
        f"bin. The mean confidence is {percent(mean)}."
    )
    alt = f"accuracy against confidence in 15 bins; expected calibration error {percent(error)}"
    return figure(caption, element("div", reliability_panel(bins, alt), class_="single"))


def _samples(run: Run) -> list[Element]:
    if run.samples is None:
        return []
    caption = (
        "The first test images with the predicted class and, where it differs, the true class."
    )
    return [section("Examples", figure(caption, png(run.samples, "test images with predictions")))]


def _config(run: Run) -> list[Element]:
    sections: dict[str, list[tuple[Child, Child]]] = {}
    for name, value in used(flatten(run.config)).items():
        part, _, leaf = name.rpartition(".")
        sections.setdefault(part or "run", []).append((leaf, element("code", value_text(value))))
    # `config.json` is in the order of the alphabet.
    order = [part for part in ("run", *SECTIONS) if part in sections]
    tables = [table((), sections.pop(part), caption=part) for part in order]
    tables += [table((), rows, caption=part) for part, rows in sections.items()]
    return [element("div", *tables, class_="columns")]


def _environments(run: Run) -> list[Element]:
    if not run.environments:
        return [element("p", "The environment was not recorded.")]
    if len(run.environments) == 1:
        return _environment(run.environments[0])
    parts: list[Element] = []
    before: dict[str, Any] = {}
    for number, part in enumerate(run.environments, 1):
        steps = ", ".join(f"{step:,}" for step in part["starts"])
        parts.append(element("h3", f"Environment {number}, from step {steps}"))
        if before:
            changed = "; ".join(changes(before, part)) or "nothing that changes the computed bits"
            parts.append(element("p", f"What changed: {changed}."))
        parts += _environment(part)
        before = part
    return parts


def _environment(part: dict[str, Any]) -> list[Element]:
    devices = part.get("devices") or []
    processor = part.get("processor") or {}
    rows = {
        "devices": f"{len(devices)} x {devices[0]}" if devices else "",
        "runtime": part.get("runtime"),
        "processor": f"{processor.get('model')}, {part.get('cores')} cores",
        "operating system": part.get("os"),
        "Python": part.get("python"),
        **(part.get("packages") or {}),
        "commit": part.get("commit") or "not recorded",
        **(part.get("variables") or {}),
    }
    unset = (None, "")
    main = [(name, element("code", value_text(v))) for name, v in rows.items() if v not in unset]
    settings = [
        (name, element("code", value_text(value)))
        for name, value in (part.get("settings") or {}).items()
        if value not in unset
    ]
    summary = element("summary", "Settings of JAX that the result depends on")
    more = element("details", summary, table((), settings))
    return [table((), main), *([more] if settings else [])]


def _commands(run: Run) -> list[Element]:
    part = run.environments[-1] if run.environments else {}
    commit = part.get("commit")
    paragraphs: list[Element] = []
    words = part.get("command") or []
    if words and str(words[0]).endswith(".py"):
        command = shlex.join(["python", *map(str, words)])
        paragraphs += [element("p", "It was trained by"), _code(command)]
    if passed := [name for name, value in run.config.items() if _is_object(value)]:
        text = (
            f"Its {', '.join(passed)} came from that script, without which it cannot be repeated."
        )
        return [*paragraphs, element("p", text)]
    again = f"{shown(run.path)}-again"
    lines = [
        *([f"git checkout {commit.removesuffix('-dirty')}"] if commit else []),
        shlex.join(
            ["python", "train.py", "--config", f"{shown(run.path)}/config.json", "--workdir", again]
        ),
        shlex.join(["python", "-m", "cnn", "evaluate", again]),
    ]
    paragraphs += [element("p", "The same config again:"), _code("\n".join(lines))]
    if commit and commit.endswith("-dirty"):
        text = "The source tree had been edited, so the commit alone may give another result."
        paragraphs.append(element("p", text, class_="notice"))
    if run.result is not None:
        text = "In the same environment result.json then has the digest above, bit for bit."
        if len(run.environments) > 1:
            text = "As its parts were trained in several environments, the digest may be another."
        paragraphs.append(element("p", text))
    return paragraphs


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "object" in value


def _code(text: str) -> Element:
    return element("pre", element("code", text), tabindex="0")
