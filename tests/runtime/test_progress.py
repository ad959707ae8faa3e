import pytest

from cnn import Metrics
from cnn.runtime.progress import Progress, fitted

HALFWAY = Metrics(sums={"loss": 25.0, "accuracy": 40.0}, count=50)


def progress(**changes):
    return Progress(
        **{
            "num_steps": 20, "steps_per_epoch": 10, "batch_size": 5, "test_count": 30,
            "start_step": 0, **changes,
        }
    )  # fmt: skip


def record(epoch, accuracy, skipped=0):
    return {
        "step": 10 * epoch, "epoch": epoch, "train_loss": 1.0, "train_accuracy": 0.5,
        "test_loss": 1.0, "test_accuracy": accuracy, "images_per_second": 100.0,
        "skipped_steps": skipped,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cnn.runtime.progress.time.monotonic", lambda: now[0])
    return now


def test_a_header_once_and_a_row_per_epoch_in_a_file(capsys, clock):
    with progress(num_steps=40, best_accuracy=0.6) as run:
        for epoch, accuracy in enumerate((0.5, 0.7, 0.65, 0.7), 1):
            run.begin_epoch(10 * (epoch - 1))
            clock[0] += 1.5
            run.epoch(record(epoch, accuracy, skipped=3 * (epoch == 3)))
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["epoch", "train", "loss"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "note:", "4"]
    assert ["*" in row for row in rows] == [False, True, False, False, True]
    assert rows[3] == "note: 3 of the 10 steps of epoch 3 were not finite and were skipped"
    assert rows[0].endswith("     100      1.5")


def test_a_plain_line_each_half_minute_where_there_is_no_terminal(capsys, clock):
    with progress() as run:
        clock[0] += 1
        assert not run.due()
        clock[0] += 30
        assert run.due()
        run.show(15, HALFWAY)
        assert not run.due()
    # Five steps are left, and one evaluation of 30 images, the work of two steps of 5 images.
    assert capsys.readouterr().out.splitlines() == [
        "estimate: 2 epochs take about 0:50",
        "epoch 2/2  50 %  train loss 0.5000  accuracy 80.00 %  2 images/s  0:14 left",
    ]


def test_the_estimate_leaves_out_what_came_before_the_lap(capsys, clock):
    with progress(num_steps=100) as run:
        with run.first_time("compiling", 1):
            clock[0] += 60
        clock[0] += 3
        assert run.due()
        run.show(4, HALFWAY)
        clock[0] += 5
        run.show(9, HALFWAY)
    # One step a second, 100 steps, and ten evaluations as long as two steps each.
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "estimate: 10 epochs take about 2:00"
    assert lines[1].endswith("5 images/s  1:56 left")
    assert len(lines) == 2


def test_a_short_run_is_not_estimated(capsys, clock):
    with progress() as run:
        clock[0] += 1
        run.images_per_second(10)
        run.epoch(record(1, 0.5))
    assert "estimate" not in capsys.readouterr().out


PARTS = (
    (0, "epoch 10/10"), (2, "100 %"), (4, "train loss 1.2345"), (3, "accuracy 100.00 %"),
    (5, "123,456 images/s"), (1, "12:34 left"),
)  # fmt: skip


@pytest.mark.parametrize("width", range(39, 80))
def test_the_live_line_keeps_what_matters_most(width):
    line = fitted(PARTS, width)
    assert len(line) <= width
    assert line.startswith("epoch 10/10  100 %")
    assert line.endswith("12:34 left")
    assert ("accuracy" in line) == (width >= 49)
    assert ("loss" in line) == (width >= 62)


def test_one_live_line_on_a_terminal(terminal, clock):
    terminal.resize(40)
    with progress() as run:
        clock[0] += 1
        run.show(15, HALFWAY)
        clock[0] += 1
        run.show(16, HALFWAY)
    assert terminal.read() == (
        "\r\x1b[Jepoch 2/2  50 %  0:00 left\r\r\x1b[Jepoch 2/2  60 %  0:01 left\r\r\x1b[J\r"
    )
