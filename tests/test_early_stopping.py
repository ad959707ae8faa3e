"""When a run stops early, by its records."""

import pytest

from cnn.early_stopping import early_stop

LOSSES = [1.0, 0.5, 0.6, 0.45, 0.5, 0.44, 0.46]


def stops_at(values, monitor="test_loss", **fields):
    """The epoch after which a run that asks after each epoch stops, and the best epoch."""
    records = [{"epoch": epoch, monitor: value} for epoch, value in enumerate(values, 1)]
    for count in range(len(records) + 1):
        found = early_stop(
            records[:count], **{"patience": 1, "monitor": monitor, "min_delta": 0.0, **fields}
        )
        if found:
            assert found["epoch"] == count
            assert found["best"] == values[found["best_epoch"] - 1]
            return count, found["best_epoch"]
    return None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"patience": 0}, None),
        ({"patience": 1}, (3, 2)),
        ({"patience": 2}, None),
        # 0.45 is not better than 0.5 by more than 0.05, nor is 0.44 by 0.1.
        ({"patience": 3, "min_delta": 0.05 + 1e-9}, (5, 2)),
        ({"patience": 4, "min_delta": 0.1}, (6, 2)),
    ],
)
def test_patience_counts_epochs_in_a_row_without_improvement(fields, expected):
    assert stops_at(LOSSES, **fields) == expected


def test_accuracies_improve_upwards_and_an_equal_one_does_not():
    assert stops_at([0.5, 0.6, 0.7, 0.7], "test_accuracy") == (4, 3)
    assert stops_at([0.5, 0.6, 0.7], "train_top5_accuracy") is None
