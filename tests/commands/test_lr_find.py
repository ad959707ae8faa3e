"""python -m cnn lr-find, and the suggestion for curves with a known answer."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from cnn.commands.lr_find import _verdict, num_before_divergence, smooth, suggest_learning_rate

RATES = np.geomspace(1e-6, 10, 100)


def fall(centre, width=0.5, low=0.5, high=2.3):
    """A loss that falls most steeply at a rate, and rises beyond a hundred times that rate."""
    decades = np.log10(RATES / centre)
    falling = high - (high - low) / (1 + np.exp(-decades / (width / 4)))
    return falling + 3 * np.maximum(decades - 2, 0) ** 2


@pytest.mark.parametrize("centre", [1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_steepest_place_is_found(centre, noise):
    noisy = fall(centre) + noise * np.random.default_rng(0).normal(size=100)
    assert centre / 2.5 < suggest_learning_rate(RATES, noisy.tolist()) < 2.5 * centre


def test_a_test_that_ended_early_suggests_the_same():
    losses = fall(1e-3).tolist()
    whole = suggest_learning_rate(RATES, losses)
    assert suggest_learning_rate(RATES[:80], losses[:80], num_updates=100) == whole


@pytest.mark.parametrize(
    "losses",
    [
        np.full(100, 2.3),
        2.3 + 0.1 * np.random.default_rng(0).normal(size=100),
        2.3 + 0.5 * np.random.default_rng(1).normal(size=100),
        2.3 + np.arange(100) ** 2,
        np.linspace(2.3, 2.29, 100),
        [2.3, 5.0, 100.0],
        [],
    ],
    ids=["constant", "noise", "much noise", "rising", "hardly falling", "diverged", "empty"],
)
def test_no_suggestion_without_a_clear_fall(losses):
    assert suggest_learning_rate(RATES[: len(losses)], list(losses), num_updates=100) is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_suggests_nothing(seed):
    losses = 2.3 + 0.2 * np.random.default_rng(seed).normal(size=100)
    assert suggest_learning_rate(RATES, losses.tolist()) is None


def test_the_mean_has_no_bias_at_the_start():
    assert smooth([3.0, 1.0], 100)[0] == pytest.approx(3.0)
    assert 1.0 < smooth([3.0, 1.0], 100)[1] < 2.0
    assert smooth([1.0] * 50, 100) == pytest.approx([1.0] * 50)


def test_the_test_ends_where_the_loss_diverges():
    flat = [1.0] * 30
    assert num_before_divergence([*flat, 2.0, 3.0], 100) == 32
    assert num_before_divergence([*flat, 1e6, 1.0, 1.0], 100) == 31
    assert num_before_divergence([*flat, float("nan"), 1.0], 100) == 30
    assert num_before_divergence([*flat, float("inf")], 100) == 30


def test_the_digits(command, small, monkeypatch):
    """The config's rate, 2e-3 with a falling schedule, lies within a factor of 10."""
    monkeypatch.setattr("cnn.runtime.screen._PATIENCE", 1e-3)
    code, out, err = command("lr-find", *small, "--config.seed", "1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["step", "rate", "loss", "smoothed"]  # no progress comes before it
    (suggested,) = [line for line in lines if line.startswith("suggestion: ")]
    rate = float(suggested.partition("=")[2].partition(";")[0])
    assert 5e-4 < rate < 0.1
    assert sum(line.split()[0].isdecimal() for line in lines if line.split()) <= 20
    words = shlex.split(" ".join(lines[lines.index(suggested) + 1 :]).replace("\\", ""))
    assert words[:4] == ["python", "train.py", "--config", "digits"]
    assert "--config.model.features=(4, 8)" in words
    assert f"--config.optimizer.learning_rate={rate:g}" in words
    (picture,) = Path.cwd().iterdir()
    assert picture.name == "lr.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_with_accumulation_and_another_picture(command, small):
    code, out, _ = command(
        "lr-find", *small, "--config.optimizer.grad_accumulation_steps=2", "--steps=60",
        "--low=1e-5", "--high", "1", "--json", "--output=new/curve.PNG",
    )  # fmt: skip
    figures = json.loads(out)
    assert code == (0 if figures["suggestion"] else 1)
    rates = figures["learning_rates"]
    assert 20 < len(rates) <= 30
    assert rates[0] == pytest.approx(1e-5)
    assert rates[1] == pytest.approx(1e-5 ** (28 / 29), rel=1e-4)
    assert len(rates) == len(figures["losses"]) == len(figures["smoothed_losses"])
    assert [path.name for path in Path.cwd().rglob("*")] == ["new", "curve.PNG"]


def test_immediate_divergence_is_said_plainly_and_is_exit_code_1(command, small):
    code, out, err = command("lr-find", *small, "--low=1e10", "--high=1e12", "--steps=20")
    assert (code, err) == (1, "")
    assert out.splitlines()[-1].startswith("no suggestion: the loss diverges at 1.")


def test_other_curves_without_a_suggestion():
    assert "the loss of the first step is not finite" in _verdict(None, None, [], stopped=True)
    flat = _verdict(None, None, [1e-6, 1e-5], stopped=False)
    assert "does not fall clearly between 1.0e-06 and 1.0e-05; give more --steps" in flat


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--steps=5"], "--steps=5 must be 20 or more"),
        (["--steps=x"], "--steps: invalid int value: 'x'"),
        (["--low=1", "--high=1"], "--low=1 must be less than --high=1"),
        (["--low=nan"], "--low=nan must be less than"),
        (["--low=0"], "must lie between 1e-30 and 1e30"),
        (["--output=lr.pdf"], "must be the name of a file that ends in .png"),
        (["--output=/proc/x/lr.png"], "/proc/x cannot be written"),
        (["--output=s3://bucket/lr.png"], "is an address"),
        (["--output="], "is not a path: it is empty"),
        (["--config.optimizer.grad_accumulation_steps=9"], "--steps=100 make 11 updates"),
        (["--config.init_from=none"], "none does not exist; give the run directory"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_words_are_one_line(command, words, telling):
    code, out, err = command("lr-find", "digits", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert telling in err
    assert err.count("\n") == 1
    assert not list(Path.cwd().iterdir())
