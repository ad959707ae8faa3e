"""SIGKILL at any moment, and the same command again: the same bits."""

import json
import subprocess

import pytest

from benchmarks import workers
from benchmarks.reliability import kills
from cnn import UserError


@pytest.mark.timeout(600)
def test_killed_at_the_start_while_saving_and_at_the_very_end(tmp_path, digits):
    """Digest, figures and each record, once, are those of the run that was left alone."""
    moments = [
        ("start", 0.3), ("saving", 0.0), ("record", 0.0), ("deleting", 0.0),
        ("time", 4.0), ("pictures", 0.0),
    ]  # fmt: skip
    found = kills.torture(tmp_path, moments, print)
    assert [kill.moment for kill in found] == [moment for moment, _ in moments]
    assert found[0].step is None
    assert any(kill.saving for kill in found)
    assert found[-1].step == 176
    whole = kills.outcome(tmp_path / "whole")
    assert [record["step"] for record in whole["records"]] == [44, 88, 132, 176]
    assert whole["steps"][-2:] == [175, 176]


def test_a_run_that_ends_in_other_bits_is_an_error(tmp_path, monkeypatch):
    outcomes = iter([{"result": {"digest": "a"}}, {"result": {"digest": "b"}}])
    monkeypatch.setattr(kills, "finish", lambda run: "")
    monkeypatch.setattr(kills, "kill", lambda *_: None)
    monkeypatch.setattr(kills, "outcome", lambda run: next(outcomes))
    with pytest.raises(UserError, match=r"ends in .*'b'"):
        kills.torture(tmp_path, [("time", 0.0)], print)


def test_the_moments_are_drawn_from_the_seed():
    moments = kills.draw(200, 0, 5.0)
    assert moments == kills.draw(200, 0, 5.0)
    assert moments != kills.draw(200, 1, 5.0)
    assert {moment for moment, _ in moments} == set(kills.MOMENTS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path):
    """As in benchmarks/reliability/results/kills.md, at other moments."""
    flags = ("--kills=100", "--seed=1", "--out", tmp_path)
    command = workers.command("benchmarks.reliability.kills", *flags)
    subprocess.run(command, env=workers.environment({}), check=True)
    assert len(json.loads((tmp_path / "kills.json").read_text())["kills"]) == 100
