"""Early stopping: whether a run ends because a figure of its epochs no longer improves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cnn.errors import UserError
from cnn.registry import hint


def early_stop(
    records: Sequence[Mapping[str, Any]], *, patience: int, monitor: str, min_delta: float
) -> dict[str, Any] | None:
    """Why a run with these records ends; None if it goes on.

    A function of the records alone, so that a resumed run ends at the same epoch. An epoch improves
    on the best one so far if its figure is better by more than `min_delta`, as in Keras's
    `EarlyStopping`: lower for a loss, and higher for any other.

    Args:
      records: of all epochs so far, in order.
      patience: the run ends after this many epochs in a row without improvement; 0 never ends it.
      monitor: the figure of a record, such as "test_loss".
      min_delta: 0 or more.

    Returns:
      JSON values: the last `epoch`, the `monitor`, its `best` value, and `best_epoch`.

    >>> losses = (3.0, 2.0, 2.5, 2.25)
    >>> records = [{"epoch": i, "test_loss": loss} for i, loss in enumerate(losses, 1)]
    >>> early_stop(records, patience=2, monitor="test_loss", min_delta=0.0)
    {'epoch': 4, 'monitor': 'test_loss', 'best': 2.0, 'best_epoch': 2}
    >>> early_stop(records[:3], patience=2, monitor="test_loss", min_delta=0.0)
    """
    if not patience or not records:
        return None
    sign = -1 if monitor.endswith("_loss") else 1
    best, waited = records[0], 0
    for record in records[1:]:
        improved = sign * (record[monitor] - best[monitor]) > min_delta
        best, waited = (record, 0) if improved else (best, waited + 1)
    if waited < patience:
        return None
    return {
        "epoch": records[-1]["epoch"],
        "monitor": monitor,
        "best": best[monitor],
        "best_epoch": best["epoch"],
    }


def check_monitor(monitor: str, metrics: Iterable[str]) -> None:
    """Raises UserError unless each epoch has this figure.

    Args:
      monitor: its name in a record.
      metrics: names of what is reported beside the loss.
    """
    known = [f"{part}_{name}" for part in ("test", "train") for name in ("loss", *metrics)]
    if monitor not in known:
        raise UserError(
            f"config field early_stopping.monitor={monitor!r} is no figure of an epoch; "
            f"{hint(monitor, known)}"
        )
