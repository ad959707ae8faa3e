"""python -m cnn summary."""

import json
from pathlib import Path

import pytest

from cnn.commands import summary
from tests.helpers import REPOSITORY, without_waits


def test_the_figures_of_a_small_network(command, small, tmp_path):
    code, out, _ = command("summary", *small, "--config.num_epochs=1.5", "--json")
    assert code == 0
    figures = json.loads(out)
    names = [layer["name"] for layer in figures["layers"]]
    assert names == ["Conv_0", "Conv_1", "Dense_0", "Dense_1"]
    assert figures["layers"][0] == {
        "name": "Conv_0", "output": [8, 8, 4], "parameters": 40, "flops": 2.0 * 64 * 36,
    }  # fmt: skip
    size = 40 + 296 + 528 + 170
    assert figures["num_params"] == size == sum(x["parameters"] for x in figures["layers"])
    memory = figures["memory_bytes"]
    assert memory["parameters"] == 4 * size
    # Two moments, and the steps that Adam and its schedule count.
    assert memory["optimizer_state"] == 2 * 4 * size + 2 * 4
    assert memory["dataset"] == 1797 * (64 + 4)
    assert (figures["steps_per_epoch"], figures["num_steps"], figures["num_images"]) == (
        14, 21, 21 * 96
    )  # fmt: skip
    assert figures["temporary_bytes"] > 0
    assert 1 <= figures["measured_steps"] <= 14
    step = figures["step_seconds"] + figures["batch_seconds"]
    assert figures["epoch_seconds_estimate"] == pytest.approx(14 * step)
    assert figures["run_seconds_estimate"] == pytest.approx(21 * step)
    assert not list(Path.cwd().iterdir())
    text = summary._text(figures)
    assert "temporaries of the compiled step  " in text
    assert "estimate: " in text
    unknown = summary._text({**figures, "temporary_bytes": None})
    assert "temporaries of the compiled step: not known on this backend" in unknown


def test_nothing_is_compiled_unless_it_is_measured(command, small, monkeypatch):
    monkeypatch.setattr(summary, "compile_train_steps", None)
    monkeypatch.setattr("cnn.experiment.jit_once", None)
    monkeypatch.setattr("cnn.runtime.screen._PATIENCE", 1e-9)
    freeze = "--config.optimizer.freeze=('Conv_0',)"
    code, out, err = command("summary", *small, freeze, "--no-measure")
    assert (code, err) == (0, "")
    assert without_waits(out) == out
    assert "frozen: 40 of 1,034 parameters" in out
    assert "run: 14 steps in each epoch, 280 in 20 epochs, 26,880 images" in out
    assert "optimizer state" in out
    assert "estimate" not in out
    assert not list(Path.cwd().iterdir())


def test_a_speed_recipe(command):
    """Whitening filters that are frozen, and an average beside the weights."""
    flags = ["dataset.name=digits", "model.widths=(8, 16)", "batch_size=96", "averaging.name=ema"]
    flags = [f"--config.{flag}" for flag in flags]
    code, out, err = command("summary", "speed94", *flags, "--no-measure", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert {layer["name"]: layer["output"] for layer in figures["layers"]} == {
        "whiten": [7, 7, 8],
        "conv_0_0": [7, 7, 8], "conv_0_1": [3, 3, 8], "norm_0_0": [3, 3, 8], "norm_0_1": [3, 3, 8],
        "conv_1_0": [3, 3, 16], "conv_1_1": [1, 1, 16], "norm_1_0": [1, 1, 16],
        "norm_1_1": [1, 1, 16], "head": [10],
    }  # fmt: skip
    size = 2 * 2 * 8 + 8 + 9 * (8 * 8 + 8 * 8 + 8 * 16 + 16 * 16) + 2 * 8 + 2 * 16 + 16 * 10
    assert (figures["num_params"], figures["num_frozen"]) == (size, 2 * 2 * 8)
    memory = figures["memory_bytes"]
    assert memory["averages"] == memory["parameters"] + memory["other_collections"]


def test_a_backend_without_an_analysis():
    class Compiled:
        def memory_analysis(self):
            raise NotImplementedError

    assert summary._temporaries(Compiled()) is None


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["none"], "config file none does not exist"),
        (["digit"], "did you mean --config digits?"),
        (["digits", "digits"], "unrecognized arguments: digits; python -m cnn summary --help"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--js"], "unrecognized arguments: --js"),
        (["--config.sed=1"], "unknown config field sed; did you mean seed?"),
        (["--config.seed", "x", "digits"], "'x' is not a whole number"),
        (["--config.seed"], "--config.seed needs a value"),
        (["--config.=1"], "unknown flag '--config.=1'"),
        (["digits", "--config.batch_size=0"], "must be 1 or more"),
        (["digits", "--config.optimizer.freeze=('Cnv_0',)"], "'Cnv_0' matches no parameter; did"),
        (["digits", "--config.optimizer.freeze=('*',)"], "freezes every parameter"),
    ],
)
def test_bad_words_are_one_line(command, words, telling):
    code, out, err = command("summary", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert telling in err
    assert err.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_a_config_by_path_and_by_name_is_the_same(command, small):
    """A value in a word of its own is not taken for CONFIG."""
    _, by_name, _ = command("summary", "--config.seed", "3", *small, "--no-measure", "--json")
    path = REPOSITORY / "configs" / "digits.py"
    _, by_path, _ = command("summary", "--no-measure", "--json", *small[1:], path)
    assert json.loads(by_name) == json.loads(by_path)
