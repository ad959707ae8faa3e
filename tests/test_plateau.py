"""The learning rate falls where the training loss stays; runs end where nothing improves."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn import create_optimizer, create_schedule, digest, train_and_evaluate
from cnn.commands import report
from cnn.plateau import plateau_scale, reduce_on_plateau
from tests.helpers import Killed, records_of, watch_calls


def scales(losses, steps_per_epoch, **fields):
    """What a step of each loss multiplies its update by."""
    fields = {"patience": 2, "factor": 0.5, "min_scale": 0.0, **fields}
    tx = reduce_on_plateau(optax.sgd(1.0), steps_per_epoch=steps_per_epoch, **fields)
    params = jnp.ones(1)

    def step(opt_state, loss):
        updates, opt_state = tx.update(params, opt_state, params, value=loss)
        return opt_state, -updates[0]

    last, found = jax.jit(lambda values: jax.lax.scan(step, tx.init(params), values))(
        jnp.asarray(losses)
    )
    assert plateau_scale(last) == found[-1]
    return found.tolist()


def test_the_mean_loss_of_an_epoch_decides_from_its_last_step_on():
    """Of epochs of two steps with mean losses 2, 3, 1, 1, 1, 0.5, 0.5 and 0.5."""
    losses = [1, 3, 3, 3, 0, 2, 2, 0, 1, 1, 0, 1, 1, 0, 0, 1.0]
    assert scales(losses, 2) == [1.0] * 9 + [0.5] * 6 + [0.25]
    assert scales(losses, 2, min_scale=0.4)[-1] == pytest.approx(0.4)
    assert scales(losses, 2, patience=1)[:5] == [1.0] * 3 + [0.5] * 2


def test_other_optimizers_have_no_scale():
    assert plateau_scale(create_optimizer("adam", 1e-3).init(jnp.ones(1))) == 1


@pytest.fixture
def config(config):
    """Losses that barely move: the rate falls, and the run stops after four epochs of nine."""
    config.num_epochs = 9
    config.optimizer.learning_rate = 1e-9
    config.optimizer.grad_accumulation_steps = 2
    config.schedule.name = "one_cycle"
    config.schedule.plateau_patience = 1
    config.early_stopping.patience = 3
    config.early_stopping.monitor = "train_loss"
    config.early_stopping.min_delta = 1.0
    config.evaluation.tta = "flip"
    config.runtime.checkpoint_every_steps = 5
    return config


def test_a_run_falls_and_stops_at_the_same_steps_after_kills(
    config, tmp_path, monkeypatch, capsys, digits
):
    """Killed within the third epoch, and again after the last one, before result.json."""
    whole, result = train_and_evaluate(config, tmp_path / "whole")
    records = records_of(tmp_path / "whole")

    def kill(calls):
        if sum(calls) > 36:
            raise Killed

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        watch_calls(patch, before=kill)
        with pytest.raises(Killed):
            train_and_evaluate(config, again)
    with monkeypatch.context() as patch:
        patch.setattr("cnn.runs.final_result", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_and_evaluate(config, again)
    assert "resuming at step 35 of 126" in capsys.readouterr().out
    resumed, resumed_result = train_and_evaluate(config, again)
    assert digest(resumed) == digest(whole)
    for name in result.keys() - {"wall_seconds"}:
        assert resumed_result[name] == result[name]

    assert [record["step"] for record in records] == [14, 28, 42, 56]
    schedule = create_schedule("one_cycle", 1e-9, num_updates=63)
    best, scale = np.inf, 1.0
    for epoch, record in enumerate(records, 1):  # the loss varies with the images left out
        improves = record["train_loss"] < best * (1 - 1e-4)
        best, scale = (record["train_loss"], scale) if improves else (best, scale / 10)
        rate = float(schedule(7 * epoch - 1)) * scale
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-5)
    assert scale < 1
    assert result["stopped_early"] == {
        "epoch": 4, "monitor": "train_loss", "best": records[0]["train_loss"], "best_epoch": 1,
    }  # fmt: skip
    assert (result["num_epochs"], result["num_steps"], int(whole.step)) == (4, 56, 56)
    logits = cnn.load_run(again).logits(digits.test.images, tta="flip")
    right = (logits.argmax(-1) == digits.test.labels).mean()
    assert result["tta_test_accuracy"] == pytest.approx(right)
    assert result["tta_test_loss"] != result["test_loss"] == records[-1]["test_loss"]

    capsys.readouterr()
    assert train_and_evaluate(config, again)[1] == resumed_result
    said = capsys.readouterr().out
    assert "finished before: " in said
    report.run(argparse.Namespace(runs=[str(again)], output=None, json=False))
    for text in (said, capsys.readouterr().out):
        assert f"with test-time augmentation: {100 * right:.2f} %\n" in text
        assert "stopped early after epoch 4: best train_loss " in text
    page = (again / "report.html").read_text()
    assert "Stopped early after epoch 4" in page
    assert json.loads((again / "result.json").read_text()) == resumed_result
