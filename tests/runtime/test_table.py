import pytest

from cnn.runtime.table import epoch_table

NAMES = [
    "epoch",
    "train loss",
    "train accuracy",
    "test loss",
    "test accuracy",
    "images/s",
    "seconds",
]


def table(width, num_epochs=10, **changes):
    record = {
        "epoch": 9,
        "train_loss": 1.23456,
        "train_accuracy": 0.5,
        "test_loss": 0.9,
        "test_accuracy": 0.61234,
        "images_per_second": 6254.3,
        "seconds": 10.24,
        "is_best": True,
        **changes,
    }
    return epoch_table(record, num_epochs=num_epochs, width=width)


@pytest.mark.parametrize(
    ("width", "names", "row"),
    [
        (79, NAMES, "9 1.2346 50.00 % 0.9000 61.23 %* 6,254 10.2"),
        (59, [*NAMES[:2], "accuracy", "test loss", "accuracy", "images/s"],
         "9 1.2346 50.00 % 0.9000 61.23 %* 6,254"),
        (49, [*NAMES[:2], "accuracy", "test loss", "accuracy"], "9 1.2346 50.00 % 0.9000 61.23 %*"),
        (39, [*NAMES[:2], "test loss", "accuracy"], "9 1.2346 0.9000 61.23 %*"),
    ],
)  # fmt: skip
def test_the_least_important_columns_go_first(width, names, row):
    header, line = table(width)
    assert header.split() == " ".join(names).split()
    assert line.split() == row.split()


@pytest.mark.parametrize("width", range(39, 80))
def test_no_row_is_wider_than_the_screen_or_out_of_line(width):
    usual = table(width)
    extreme = table(
        width,
        train_loss=1e30, test_loss=123456.0, train_accuracy=1.0, test_accuracy=1.0,
        images_per_second=12345678.0, seconds=1e6,
    )  # fmt: skip
    assert usual[0] == extreme[0]
    assert max(map(len, (*usual, *extreme))) <= width
    ends = [[place for place, c in enumerate(row) if c == "%"] for _, row in (usual, extreme)]
    assert ends[0] == ends[1]


def test_a_long_run_has_room_for_its_epochs():
    header, row = table(79, num_epochs=2_000_000, epoch=1_999_999)
    assert row.startswith("1999999  ")
    assert header.startswith("  epoch  ")
