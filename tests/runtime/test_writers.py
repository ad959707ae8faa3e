"""TensorBoard shows each step once, from the first, however a run went."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnn.runtime.writers import EventFile

FIRST, SECOND = ({"step": step, "test_loss": 1 / step, "skipped_steps": 0} for step in (14, 28))


@pytest.fixture
def warnings():
    return []


def shown(directory, name="test_loss"):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars(name)]


def test_records_are_read_as_they_were_written(tmp_path, warnings):
    EventFile(tmp_path, [], warnings.append).write(FIRST)
    assert shown(tmp_path) == [(14, pytest.approx(1 / 14, rel=1e-6))]
    assert warnings == []


def test_each_start_writes_the_file_anew(tmp_path, warnings):
    """Killed behind the second record: the run continues from the first, and makes it again."""
    (tmp_path / "events.out.tfevents.0.another").touch()
    before = EventFile(tmp_path, [], warnings.append)
    before.write(FIRST)
    before.write(SECOND)
    EventFile(tmp_path, [FIRST], warnings.append).write(SECOND)
    assert [step for step, _ in shown(tmp_path)] == [14, 28]
    assert len(list(tmp_path.iterdir())) == 2, "the file of another program stays"
    assert warnings == []


def test_a_tensorboard_that_is_running_sees_each_step_once(tmp_path, warnings):
    before = EventFile(tmp_path, [], warnings.append)
    before.write(FIRST)
    before.write(SECOND)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    EventFile(tmp_path, [FIRST], warnings.append).write(SECOND)
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("test_loss")] == [14, 28]


@pytest.mark.parametrize("when", ["at the start", "later", "without a working package"])
def test_a_failure_is_one_warning(tmp_path, warnings, monkeypatch, when):
    if when == "at the start":
        (tmp_path / "tensorboard").touch()
    elif when != "later":
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    events = EventFile(tmp_path / "tensorboard", [FIRST], warnings.append)
    if when == "later":
        (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
    events.write(SECOND)
    events.write(SECOND)
    (warning,) = warnings
    assert warning.startswith("no more records are written for TensorBoard (")
    assert warning.isprintable()
