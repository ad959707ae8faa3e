"""TensorBoard shows each step once, from the first, however often a run was killed."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnn.runtime.writers import TensorBoardWriter

FIRST, SECOND = (
    {"step": step, "epoch": step / 14, "test_loss": 1 / step, "skipped_steps": 0}
    for step in (14, 28)
)


def shown(directory, name="test_loss"):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars(name)]


def test_records_are_read_as_they_were_written(tmp_path):
    TensorBoardWriter(tmp_path)(FIRST)
    assert shown(tmp_path) == [(14, pytest.approx(1 / 14, rel=1e-6))]
    assert shown(tmp_path, "epoch") == [(14, 1.0)]


def test_each_start_writes_a_new_file(tmp_path):
    """Killed after the second record: the run resumes from the first, and repeats the second."""
    (tmp_path / "events.out.tfevents.0.another").touch()
    before = TensorBoardWriter(tmp_path)
    before(FIRST)
    before(SECOND)
    TensorBoardWriter(tmp_path, [FIRST])(SECOND)
    assert [step for step, _ in shown(tmp_path)] == [14, 28]
    assert len(list(tmp_path.iterdir())) == 2, "the file of another program is kept"


def test_a_running_tensorboard_sees_each_step_once(tmp_path):
    before = TensorBoardWriter(tmp_path)
    before(FIRST)
    before(SECOND)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    TensorBoardWriter(tmp_path, [FIRST])(SECOND)
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("test_loss")] == [14, 28]


def test_a_failure_is_raised_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        TensorBoardWriter(tmp_path / "file", [FIRST])
    writer = TensorBoardWriter(tmp_path / "tensorboard", [FIRST])
    (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            writer(SECOND)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(ImportError):
        TensorBoardWriter(tmp_path / "tensorboard")
