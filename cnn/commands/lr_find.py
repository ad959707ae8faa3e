"""Suggests a learning rate for a config: the learning-rate range test.

    python -m cnn lr-find digits
    python -m cnn lr-find baseline --config.optimizer.name=sgd --steps 300

The rate grows exponentially from --low to --high over --steps batches, with the config's own model,
data and optimizer, and the training loss is recorded (Smith 2017, "Cyclical Learning Rates for
Training Neural Networks", section 3.3). The test ends early where the smoothed loss is more than
4 times its best, or is not finite. The suggestion is the rate at which the smoothed loss falls most
steeply against the logarithm of the rate. The first tenth of the updates, where the mean is
not settled, and all beyond the least loss are not considered.

It is the peak for the config's schedule; groups of parameters with rates of their own keep their
proportion to it. It depends on the seed: take it as right within a factor
of 3. Nothing is written but the picture. Exit code 1: there is no suggestion.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from cnn.commands.common import make_folder, output_file, print_json
from cnn.commands.prepare import prepared
from cnn.config import to_json_dict
from cnn.errors import UserError
from cnn.execution import compile_train_steps
from cnn.experiment import Experiment
from cnn.optimization import optimizer_arguments
from cnn.optimizers import create_optimizer
from cnn.runtime.plots import plot_learning_rates
from cnn.runtime.screen import log, shown, waiting, warning_on_failure
from cnn.steps import TrainState
from cnn.transfer import find_source, transfer

TAKES_CONFIG = True
_FEWEST_STEPS = 20
_DIVERGED = 4.0  # times the best smoothed loss
_IGNORED = 0.1  # of the steps, at the beginning
_WINDOW = 0.06  # of the steps, over which the loss is averaged
_LEAST_FALL = 0.02  # of the smoothed loss, for a suggestion; and so many standard errors of it:
_STANDARD_ERRORS = 6.0
_MOST_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("--steps", type=int, default=100, metavar="N", help="batches of the test (default: 100)")
    add("--low", type=float, default=1e-6, metavar="X", help="first rate (default: 1e-6)")
    add("--high", type=float, default=10.0, metavar="X", help="last rate (default: 10)")
    add("--output", default="lr.png", metavar="PNG", help="the picture (default: lr.png)")
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Makes the test and prints the suggestion; returns 1 if there is none."""
    _check(arguments)
    output = output_file(arguments.output, ".png")
    num_updates = _num_updates(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # what is said of weights that are transferred
        rates, losses = range_test(arguments)
    smoothed = smooth(losses, num_updates)
    suggestion = suggest_learning_rate(rates, losses, num_updates=num_updates)
    command = None
    if suggestion is not None:
        suggestion = float(f"{suggestion:.1e}")  # more digits would promise too much
        rate = f"--config.optimizer.learning_rate={suggestion:g}"
        command = arguments.chosen.train_command(rate)
    with warning_on_failure(f"{shown(output)} is not drawn"):
        make_folder(output.parent)
        title = f"learning-rate range test of {arguments.chosen.name}"
        plot_learning_rates(rates, losses, smoothed, output, title=title, suggestion=suggestion)
    stopped = len(rates) < num_updates
    if arguments.json:
        figures = {
            "config": arguments.chosen.name,
            "suggestion": suggestion,
            "command": command and " ".join(command.split()),
            "stopped_early": stopped,
            "learning_rates": rates,
            "losses": losses,
            "smoothed_losses": smoothed,
            "picture": str(output),
        }
        print_json(figures)
    else:
        log(_table(rates, losses, smoothed))
        log(f"curve: {shown(output)}")
        log(_verdict(suggestion, command, rates, stopped=stopped))
    return 1 if suggestion is None else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot give a test."""
    if not _FEWEST_STEPS <= arguments.steps < 2**31:
        raise UserError(
            f"--steps={arguments.steps} must be {_FEWEST_STEPS} or more, and below 2**31"
        )
    if not 1e-30 <= arguments.low < arguments.high <= 1e30:
        raise UserError(
            f"--low={arguments.low:g} must be less than --high={arguments.high:g}, and both must "
            f"lie between 1e-30 and 1e30"
        )
    if _num_updates(arguments) < _FEWEST_STEPS:
        raise UserError(
            f"--steps={arguments.steps} make {_num_updates(arguments)} updates with the config's "
            f"optimizer.grad_accumulation_steps; {_FEWEST_STEPS} or more are needed"
        )


def _num_updates(arguments: argparse.Namespace) -> int:
    """Of the test: an optimizer that accumulates gradients makes fewer than steps."""
    return arguments.steps // arguments.chosen.config.optimizer.grad_accumulation_steps


def range_test(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Trains while the rate grows, on a state that is thrown away.

    Args:
      arguments: of the command.

    Returns:
      The rate of each update before the test ended, and the mean training loss before it.
    """
    config, num_updates = arguments.chosen.config, _num_updates(arguments)
    source = find_source(config.init_from)
    with prepared(config) as experiment:
        growth = optax.exponential_decay(
            arguments.low, num_updates - 1, arguments.high / arguments.low
        )
        optimizer = optimizer_arguments(config, experiment.num_steps, experiment.steps_per_epoch)
        for name, group in optimizer.get("groups", {}).items():
            part = config.optimizer.groups[name].learning_rate / config.optimizer.learning_rate
            group["learning_rate"] = functools.partial(_scaled, growth, part)
        tx = create_optimizer(**{**optimizer, "learning_rate": growth})
        experiment = dataclasses.replace(experiment, schedule=growth, tx=tx)
        with waiting("initializing the model"):
            state = experiment.initial_state()
        if source is not None:
            state, _ = transfer(experiment, state, source, to_json_dict(config))
        losses = _train(experiment, state, num_updates)
        rates = np.asarray(growth(np.arange(len(losses)))).tolist()
    return rates, losses


def _scaled(schedule: optax.Schedule, part: float, count: Any) -> Any:
    """The rate of a group of parameters, which keeps its proportion to that of the others."""
    return part * schedule(count)


def _train(experiment: Experiment, state: TrainState, num_updates: int) -> list[float]:
    """The mean training loss before each update, up to the one by which it has diverged."""
    train_steps = compile_train_steps(state, experiment.pipeline)
    accumulation = experiment.config.optimizer.grad_accumulation_steps
    steps, losses = [], []
    with waiting("training with a growing rate"):
        for batches, count in experiment.pipeline.batches(0, num_updates * accumulation):
            state, metrics = train_steps(state, batches, count)
            metrics = jax.device_get(metrics)
            images = np.ravel(metrics.count)[:count]
            sums = np.ravel(metrics.sums["loss"])[:count]
            # A step whose loss or gradients are not finite counts no image.
            steps += np.where(images > 0, sums / np.maximum(images, 1), math.nan).tolist()
            whole = len(steps) // accumulation
            losses = np.reshape(steps[: whole * accumulation], (whole, -1)).mean(axis=1).tolist()
            if (kept := num_before_divergence(losses, num_updates)) < whole:
                return losses[:kept]
    return losses


def num_before_divergence(losses: Sequence[float], num_updates: int) -> int:
    """How many losses are kept: up to the first by which their mean diverges.

    Args:
      losses: of the updates so far.
      num_updates: of the whole test.
    """
    best = math.inf
    for index, loss in enumerate(smooth(losses, num_updates)):
        if not math.isfinite(loss):
            return index
        best = min(best, loss)
        if loss > _DIVERGED * best:
            return index + 1
    return len(losses)


def smooth(losses: Sequence[float], num_updates: int) -> list[float]:
    """The exponential moving average, divided by the sum of its weights so that it has no bias.

    Args:
      losses: of the updates.
      num_updates: of the whole test, of which the average covers a fixed part.

    >>> [round(loss, 3) for loss in smooth([2.0, 2.0, 1.0], num_updates=100)]
    [2.0, 2.0, 1.604]
    """
    decay, mean, smoothed = _decay(num_updates), 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = decay * mean + (1 - decay) * loss
        smoothed.append(mean / (1 - decay**step))
    return smoothed


def _decay(num_updates: int) -> float:
    return 1 - 1 / max(_WINDOW * num_updates, 1.0)


def suggest_learning_rate(
    rates: Sequence[float], losses: Sequence[float], *, num_updates: int | None = None
) -> float | None:
    """The rate at which the smoothed loss falls most steeply against the logarithm of the rate.

    The first tenth of the test and what comes after the least smoothed loss are ignored.

    Args:
      rates: ascending.
      losses: at these rates.
      num_updates: of the whole test, if it ended early.

    Returns:
      None where the loss does not fall clearly: by 2 %, and by 6 standard errors of the mean.

    >>> rates = np.geomspace(1e-5, 1, 100)
    >>> suggestion = suggest_learning_rate(rates, 2 - 1 / (1 + (1e-3 / rates) ** 2))
    >>> bool(0.5e-3 < suggestion < 2e-3)
    True
    """
    num_updates = num_updates or len(rates)
    smoothed = np.asarray(smooth(losses, num_updates))
    first = round(_IGNORED * num_updates)
    if len(smoothed) - first < 3:
        return None
    last = first + int(np.argmin(smoothed[first:]))
    decay = _decay(num_updates)
    # A mean lags behind what it averages by its mean age.
    lag = decay / (1 - decay)
    # From the median, as the noise grows where the rate is high; 0.6745 is that of a normal one.
    noise = np.median(np.abs(np.diff(losses[: last + 1]))) / 0.6745 / math.sqrt(2)
    error = noise * math.sqrt((1 - decay) / (1 + decay))
    fall = smoothed[first] - smoothed[last]
    if fall <= max(_LEAST_FALL * abs(smoothed[first]), _STANDARD_ERRORS * error):
        return None
    slopes = np.gradient(smoothed, np.log(rates))
    steepest = first + int(np.argmin(slopes[first : last + 1]))
    return float(rates[max(steepest - round(lag), 0)])


def _table(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float]) -> str:
    every = -(-len(rates) // _MOST_ROWS) or 1
    rows = [f"{'step':>6}  {'rate':>8}  {'loss':>9}  {'smoothed':>9}"]
    rows += [
        f"{step + 1:>6}  {rates[step]:>8.1e}  {losses[step]:>9.4f}  {smoothed[step]:>9.4f}"
        for step in range(0, len(rates), every)
    ]
    return "\n".join(rows)


def _verdict(
    suggestion: float | None, command: str | None, rates: Sequence[float], *, stopped: bool
) -> str:
    if suggestion is not None:
        ending = f"; the loss diverges at {rates[-1]:.1e}" if stopped else ""
        return f"suggestion: optimizer.learning_rate={suggestion:g}{ending}\n{command}"
    if not rates:
        return "no suggestion: the loss of the first step is not finite; look at model and data"
    if stopped:
        return (
            f"no suggestion: the loss diverges at {rates[-1]:.1e} before it has fallen clearly; "
            f"give a lower --low, or more --steps"
        )
    return (
        f"no suggestion: the loss does not fall clearly between {rates[0]:.1e} and "
        f"{rates[-1]:.1e}; give more --steps or a higher --high, and look at the curve"
    )
