"""Tables whose columns fit the screen, and the one of epochs that a run prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GAP = "  "


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      name: in the header.
      short: in the header of a narrow table.
      rank: columns of a higher rank are dropped first, and those of 0 and 1 never.
      cell: from a record to a text.
      size: the characters of the longest cell, if it may be longer than the name.
    """

    name: str
    short: str
    rank: int
    cell: Callable[[Mapping[str, Any]], str]
    size: int = 0


def percent(fraction: float) -> str:
    """A fraction for people.

    >>> percent(0.69567)
    '69.57 %'
    """
    return f"{100 * fraction:.2f} %"


def shortened(text: str, size: int) -> str:
    """A text in at most so many characters, without its middle if it is longer.

    >>> shortened("daisy_white", 8), shortened("rose", 8)
    ('dai..ite', 'rose')
    """
    if len(text) <= size:
        return text
    kept = max(size - 2, 0)
    return f"{text[: kept - kept // 2]}..{text[len(text) - kept // 2 :]}"[:size]


def value_text(value: Any) -> str:
    """A config value as one types it.

    >>> value_text(3e-4), value_text([16, 32]), value_text(["crop"]), value_text(True)
    ('0.0003', '(16, 32)', '(crop,)', 'True')
    """
    if isinstance(value, list | tuple):
        inside = ", ".join(map(value_text, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def loss(value: float) -> str:
    """A loss in at most nine characters.

    >>> loss(1.23456), loss(123456.7)
    ('1.2346', '1.235e+05')
    """
    return f"{value:.4f}" if value < 1e4 else f"{value:.3e}"


def _whole(value: float) -> str:
    """In at most eight characters up to a hundred millions."""
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0f}"


def _columns(record: Mapping[str, Any], num_epochs: int) -> list[Column]:
    """Of a record: loss and metrics of training, those of testing, and the speed."""
    metrics = [name.removeprefix("test_") for name in record if name.startswith("test_")]
    others = [name for name in metrics if name not in ("loss", "accuracy", "count")]
    return [
        Column("epoch", "epoch", 0, lambda r: epoch_number(r["epoch"]), len(f"{num_epochs}")),
        Column("train loss", "train loss", 3, lambda r: loss(r["train_loss"])),
        _metric_column("train", "accuracy", 4),
        *(_metric_column("train", name, 8) for name in others),
        Column("test loss", "test loss", 2, lambda r: loss(r["test_loss"])),
        # The blank is the place of the mark.
        Column(
            "test accuracy ",
            "accuracy ",
            1,
            lambda r: percent(r["test_accuracy"]) + ("*" if r["is_best"] else " "),
        ),
        *(_metric_column("test", name, 5) for name in others),
        Column("images/s", "images/s", 6, lambda r: _whole(r["images_per_second"])),
        Column(
            "seconds",
            "seconds",
            7,
            lambda r: f"{r['seconds']:.1f}" if r["seconds"] < 1e4 else _whole(r["seconds"]),
        ),
    ]


def epoch_number(epoch: int | float) -> str:
    """The number of an epoch, or of a part of one, for people.

    >>> epoch_number(1999999), epoch_number(2 + 1 / 3)
    ('1999999', '2.33')
    """
    return f"{epoch}" if epoch == round(epoch) else f"{epoch:.2f}"


def _metric_column(part: str, name: str, rank: int) -> Column:
    """A column of a metric; accuracies are shown in per cent."""
    title, field = name.replace("_", " "), f"{part}_{name}"
    show = percent if name.endswith("accuracy") else loss
    return Column(f"{part} {title}", title, rank, lambda r: show(r[field]))


def epoch_table(record: Mapping[str, Any], *, num_epochs: int, width: int) -> tuple[str, str]:
    """The header and the row of an epoch, aligned with those of all other epochs.

    Where the width does not suffice for all columns, their names are shortened, and then the least
    important columns are left out: further metrics of training first, then seconds, images/s,
    further metrics of testing, train accuracy and train loss.

    Args:
      record: a line of `metrics.jsonl` with two more entries: `seconds`, of the whole epoch, and
        `is_best`, whether no epoch so far was more accurate on the test images.
      num_epochs: of the run.
      width: columns that there are.

    Returns:
      Two lines of at most `width` characters, if it is 39 or more.
    """
    header, row = table_row(_columns(record, num_epochs), record, width)
    return header.rstrip(), row.rstrip()


def table_row(columns: Sequence[Column], record: Mapping[str, Any], width: int) -> tuple[str, str]:
    """The header and a row of a table, of the same length.

    Where the width does not suffice for all columns, their names are shortened, and then columns
    are left out.
    """
    names = {column: column.name for column in columns}

    def widths() -> dict[Column, int]:
        return {column: max(len(name), column.size) for column, name in names.items()}

    def is_too_wide() -> bool:
        return sum(widths().values()) + len(GAP) * (len(names) - 1) > width

    if is_too_wide():
        names = {column: column.short for column in columns}
    while is_too_wide() and (last := max(names, key=lambda column: column.rank)).rank > 1:
        del names[last]
    sizes = widths()
    cells = {column: column.cell(record) for column in names}
    header, row = (
        GAP.join(f"{texts[column]:>{size}}" for column, size in sizes.items())
        for texts in (names, cells)
    )
    return header, row
