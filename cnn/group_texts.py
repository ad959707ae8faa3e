"""What the screen shows of a group of runs: a row for each member, and the final figures.

A group and its members are given as its `result.json` holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnn.runtime.progress import format_duration
from cnn.runtime.table import GAP, Column, loss, percent, shortened, table_row, value_text

_MOST_CHARACTERS = 20  # of a swept value
_SHORT_NAME = 8  # characters of a field's name in a narrow table
_SHORTEST = 4  # characters to which a long value is cut where there is no room at all
_MORE_SEEDS = "--config.num_seeds=5"


def member_row(
    member: Mapping[str, Any],
    group: Sequence[Mapping[str, Any]],
    *,
    is_best: bool,
    width: int,
) -> tuple[str, str]:
    """The header and the row of a member that is done, aligned with those of all other members.

    The first columns are the swept fields and the seed. Where the width does not suffice, names are
    shortened, and then columns are left out: train loss first, best accuracy, and time.

    Args:
      member: of `members` or of `diverged`.
      group: all members of the group, also those to come, with their `settings` and `seed`.
      is_best: whether no member so far was more accurate on the test images.
      width: columns that there are.

    Returns:
      Two lines of at most `width` characters, if it is 39 or more.
    """

    def known(show: Callable[[Any], str], field: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda record: show(record[field]) if field in record else ""

    def accuracy(record: Mapping[str, Any]) -> str:
        if "error" in record:
            return "diverged "
        return percent(record["test_accuracy"]) + ("*" if is_best else " ")

    columns = [
        Column("train loss", "train loss", 4, known(loss, "train_loss")),
        Column("best accuracy", "best", 3, known(percent, "best_test_accuracy"), 8),
        Column("test accuracy ", "accuracy ", 1, accuracy),
        Column("time", "time", 2, known(format_duration, "wall_seconds"), 7),
    ]
    labels = [{**each["settings"], "seed": each["seed"]} for each in group]
    shown = {**member["settings"], "seed": member["seed"]}
    header, row = _table(labels, columns, [(shown, member)], width)
    return header, row


def points_table(result: Mapping[str, Any], width: int) -> str:
    """The table of a sweep: a header, and a row for each of its points; a star marks the best.

    Where the width does not suffice, names are shortened, and then columns are left out: the
    interval first, then the number of seeds.

    Args:
      result: of the group.
      width: columns that there are; 39 suffice.
    """
    points, best = result["points"], result.get("best")

    def accuracy(point: Mapping[str, Any]) -> str:
        if (spread := _spread(point)) is None:
            return "diverged "
        star = "*" if point == best else " "
        if spread["std"] is None:
            return percent(spread["mean"]) + star
        return f"{100 * spread['mean']:.2f} ± {percent(spread['std'])}{star}"

    def seeds(point: Mapping[str, Any]) -> str:
        count = (_spread(point) or {"count": 0})["count"]
        diverged = point["num_diverged"]
        return f"{count} of {count + diverged}" if diverged else f"{count}"

    def interval(point: Mapping[str, Any]) -> str:
        ends = (_spread(point) or {"interval": None})["interval"]
        return _interval_text(ends) if ends else ""

    def column(name: str, short: str, rank: int, cell: Callable[[Any], str]) -> Column:
        return Column(name, short, rank, cell, max(len(cell(point)) for point in points))

    columns = [
        column("seeds", "seeds", 2, seeds),
        column("test accuracy ", "accuracy ", 1, accuracy),
        column("95 % interval", "95 % interval", 3, interval),
    ]
    if not any(map(interval, points)):
        del columns[-1]
    labels = [point["settings"] for point in points]
    return "\n".join(_table(labels, columns, list(zip(labels, points, strict=True)), width))


def group_text(result: Mapping[str, Any]) -> str:
    """The figures of a finished group, of a sweep those of its best point, for people.

    Args:
      result: of the group.
    """
    members, diverged = result["members"], result["diverged"]
    is_sweep = "num_points" in result
    lines = []
    if not members:
        lines += ["no member has a test accuracy"]
    elif is_sweep:
        lines += _best_texts(result["best"], result["points"])
    else:
        accuracies = [member["test_accuracy"] for member in members]
        lines += _spread_texts(result["points"][0])
        if len(members) > 1:
            lines += [f"lowest {percent(min(accuracies))}, highest {percent(max(accuracies))}"]
    if diverged:
        number = len(members) + len(diverged)
        lines += [f"diverged: {len(diverged):,} of {number:,} members (result.json says why)"]
    lines += [f"time: {format_duration(result['wall_seconds'])}"]
    return "\n  ".join(lines)


def _spread_texts(point: Mapping[str, Any]) -> list[str]:
    """The accuracy of a point, and what is known of its spread."""
    spread, tta = _spread(point), point["statistics"].get("tta_test_accuracy")
    assert spread is not None
    lines = [f"test accuracy {_mean_text(spread)}"]
    if spread["std"] is not None:
        lines[0] += f" (std of {spread['count']} seeds)"
        interval = _interval_text(spread["interval"])
        lines += [f"95 % interval of the mean: {interval} (Student's t)"]
    else:
        more = "" if point["num_diverged"] else f"; more: {_MORE_SEEDS}"
        lines += [f"one seed says nothing of the spread over seeds{more}"]
    return lines + ([f"with test-time augmentation: {_mean_text(tta)}"] if tta else [])


def _best_texts(best: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best point of a sweep, and how sure it is that it is the best."""
    known = sorted(filter(_spread, points), key=_mean, reverse=True)
    accuracy, *others = _spread_texts(best)
    lines = [f"best of {len(points):,} settings: {_settings_text(best)}", accuracy, *others]
    if len(known) > 1:
        second = next(point for point in known if point != best)
        lines += [
            f"the highest of {len(known):,} results is partly luck: "
            "expect less of new seeds and images",
            f"second best: {_settings_text(second)}, {percent(_mean(second))}",
            _order_text(best, second),
        ]
    return lines


def _order_text(best: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Whether the intervals of two points tell which is better."""
    first, other = (point["statistics"]["test_accuracy"]["interval"] for point in (best, second))
    if not first or not other:
        return "their order is uncertain, as one seed has no spread"
    if first[0] <= other[1]:
        return "the intervals of the two overlap, so their order is uncertain"
    return "the intervals of the two do not overlap"


def _spread(point: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The test accuracy over the seeds of a point; None if all diverged."""
    return point["statistics"].get("test_accuracy")


def _mean(point: Mapping[str, Any]) -> float:
    return point["statistics"]["test_accuracy"]["mean"]


def _mean_text(spread: Mapping[str, Any]) -> str:
    """A mean with its standard deviation, where there is one."""
    std = spread["std"]
    return percent(spread["mean"]) + ("" if std is None else f" ± {percent(std)}")


def _interval_text(interval: Sequence[float]) -> str:
    """An interval of an accuracy, which is between 0 and 1 whatever the formula says.

    >>> _interval_text([0.6301, 1.02])
    '63.01 to 100.00 %'
    """
    low, high = max(interval[0], 0.0), min(interval[1], 1.0)
    return f"{100 * low:.2f} to {percent(high)}"


def _settings_text(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in point["settings"].items())


def _table(
    labels: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    width: int,
) -> list[str]:
    """A header and rows that begin with labels.

    Args:
      labels: all that are to be aligned, with the same fields.
      columns: beside the labels.
      rows: a label and a record of the columns, at least one.
      width: of the lines.
    """

    def cells(label: Mapping[str, Any]) -> list[str]:
        return [shortened(value_text(value), _MOST_CHARACTERS) for value in label.values()]

    names = _short_names(list(labels[0]))
    least = [max(map(len, column)) for column in zip(*map(cells, labels), strict=True)]
    sizes = [max(len(name), size) for name, size in zip(names, least, strict=True)]
    gaps = len(GAP) * len(names)  # with the one before the columns
    beside = sum(len(GAP) + max(len(column.short), column.size) for column in columns) - len(GAP)
    narrow = [max(min(size, _SHORT_NAME), few) for size, few in zip(sizes, least, strict=True)]
    # Names of fields are shortened before columns are left out, and after those of the columns.
    label = sum(sizes if sum(sizes) + gaps + beside <= width else narrow)
    tables = [table_row(columns, record, width - label - gaps) for _, record in rows]
    room = width - len(tables[0][0]) - gaps
    for floors in (least, [min(size, _SHORTEST) for size in least]):
        while sum(sizes) > room and (
            wide := [place for place, size in enumerate(sizes) if size > floors[place]]
        ):
            sizes[max(wide, key=lambda place: sizes[place])] -= 1

    def line(texts: Sequence[str], cut: Callable[[str, int], str], rest: str) -> str:
        fitting = (f"{cut(text, size):>{size}}" for text, size in zip(texts, sizes, strict=True))
        label = _tail(GAP.join(fitting), width - len(rest) - len(GAP))
        return f"{label}{GAP}{rest}".rstrip()

    return [
        line(names, _tail, tables[0][0]),
        *(
            line(cells(label), shortened, row)
            for (label, _), (_, row) in zip(rows, tables, strict=True)
        ),
    ]


def _short_names(fields: Sequence[str]) -> list[str]:
    """The last parts of the fields, or all of them where two have the same.

    >>> _short_names(["optimizer.name", "optimizer.b1"]), _short_names(["model.name", "loss.name"])
    (['name', 'b1'], ['model.name', 'loss.name'])
    """
    short = [field.rpartition(".")[2] for field in fields]
    return short if len(set(short)) == len(short) else list(fields)


def _tail(text: str, size: int) -> str:
    """The end of a text, in at most so many characters.

    >>> _tail("learning_rate", 8), _tail("seed", 8)
    ('..g_rate', 'seed')
    """
    return text if len(text) <= size else f"..{text[len(text) - size + 2 :]}"[:size]
