"""The result of a speed run in words and tables, in the form in which such runs are published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report import Mean, table
from benchmarks.speedrun.original import OriginalRun
from benchmarks.speedrun.runs import Seed
from cnn.errors import number_of

_INCLUDED = """\
Seconds of training: gathering, augmenting and normalizing batches, and all steps, without
compilation and without the dataset's loading; from the speed of each epoch, where one in which a
process, or images of another size, began counts with the median speed of the others of its size.
The last evaluation is timed apart, on this machine, once it is compiled. The initial weights and
the whitening are in neither. Whole run: `wall_seconds` of `result.json`, from the start of
`train_and_evaluate`, with loading, compilation, saves and the test after each epoch. FLOPs: two
per multiply-add, of training and of the last evaluation with all its views
(`benchmarks/flops.py`)."""


def claim(name: str, seeds: Sequence[Seed], evaluation: float | None) -> str:
    """The sentence that published scripts begin with."""
    accuracy = Mean.of([seed.tta_accuracy or seed.accuracy for seed in seeds])
    seconds = Mean.of([seed.training_seconds + (evaluation or 0.0) for seed in seeds]).mean
    flop = Mean.of([seed.training_flop + seed.evaluation_flop for seed in seeds]).mean
    devices = " / ".join(dict.fromkeys(seed.device for seed in seeds))
    jax = " / ".join(dict.fromkeys(seed.versions.get("jax", "unknown") for seed in seeds))
    what = "training and last evaluation" if evaluation is not None else "training alone"
    return (
        f"**{name}** runs in {seconds:,.4g} seconds ({what}) on {devices} using jax {jax}, and "
        f"attains {100 * accuracy.mean:.2f} % mean accuracy ({number_of(accuracy.n, 'seed')}) with "
        f"{flop / 1e15:.3g} PFLOP."
    )


def figures(seeds: Sequence[Seed], evaluation: float | None) -> dict[str, Mean]:
    """Name of a figure -> its samples' mean; of accuracies fractions, of times seconds."""
    found = {}
    views = [seed.tta_accuracy for seed in seeds if seed.tta_accuracy is not None]
    if views:
        found["accuracy with test-time augmentation"] = Mean.of(views)
    found["accuracy"] = Mean.of([seed.accuracy for seed in seeds])
    training = [seed.training_seconds for seed in seeds]
    found["seconds of training"] = Mean.of(training)
    if evaluation is not None:
        found["seconds of training and last evaluation"] = Mean.of(
            [seconds + evaluation for seconds in training]
        )
    found["seconds of the whole run"] = Mean.of([seed.wall_seconds for seed in seeds])
    return found


def text(
    name: str,
    line: str,
    seeds: Sequence[Seed],
    evaluation: float | None,
    originals: dict[str, Sequence[OriginalRun]],
    machine: str,
) -> str:
    """The Markdown page of a result.

    Args:
      name: of the config.
      line: the command.
      seeds: finished, at least one.
      evaluation: seconds of the last evaluation, if they were measured.
      originals: by the name of the script and its variant, the runs beside ours.
      machine: the sentence about the machine of this command.
    """
    rows = [
        [what, *(mean.cells(2, 100, " %") if "accuracy" in what else mean.cells(1, 1, " s"))]
        for what, mean in figures(seeds, evaluation).items()
    ]
    parts = [
        f"`{line}`\n",
        f"{claim(name, seeds, evaluation)}\n",
        table(["figure", "n", "mean", "std", "95 % interval of the mean (t)"], rows) + "\n",
        f"{_INCLUDED}\n",
        _flop_text(seeds) + "\n",
        _seed_table(seeds) + "\n",
    ]
    if originals:
        parts += ["The original script, one run at a time in turns with ours:\n"]
        parts += [_original_table(originals, seeds, evaluation) + "\n"]
    parts += [f"This command ran on {machine}.\n"]
    return "\n".join(parts)


def _flop_text(seeds: Sequence[Seed]) -> str:
    flop, test = seeds[0].training_flop, seeds[0].evaluation_flop
    rate = Mean.of([seed.training_flop / seed.training_seconds for seed in seeds]).mean
    return (
        f"Training: {flop / 1e15:.4f} PFLOP, last evaluation: {test / 1e15:.4f} PFLOP; in training "
        f"{rate / 1e12:,.3g} TFLOP/s."
    )


def _seed_table(seeds: Sequence[Seed]) -> str:
    head = ["seed", "with augmentation", "without", "training, s", "whole run, s", "processes"]
    rows = [
        [
            str(seed.seed),
            "-" if seed.tta_accuracy is None else f"{100 * seed.tta_accuracy:.2f} %",
            f"{100 * seed.accuracy:.2f} %",
            f"{seed.training_seconds:,.1f}",
            f"{seed.wall_seconds:,.1f}",
            str(seed.num_processes),
            (seed.commit or "unknown")[:12],
            seed.digest[:12],
        ]
        for seed in seeds
    ]
    return table([*head, "commit", "digest"], rows)


def _original_table(
    originals: dict[str, Sequence[OriginalRun]], seeds: Sequence[Seed], evaluation: float | None
) -> str:
    head = ["script", "n", "accuracy with augmentation", "without", "seconds", "this / ours"]
    ours = Mean.of([seed.training_seconds + (evaluation or 0.0) for seed in seeds]).mean
    rows = []
    for name, runs in originals.items():
        seconds = Mean.of([run.seconds for run in runs])
        rows.append(
            [
                name,
                str(len(runs)),
                _percent([run.tta_accuracy for run in runs]),
                _percent([run.accuracy for run in runs]),
                f"{seconds.mean:,.1f}",
                f"{seconds.mean / ours:.2f}",
            ]
        )
    return table(head, rows)


def _percent(fractions: Sequence[float]) -> str:
    found = Mean.of(fractions)
    spread = "" if found.std is None else f" ± {100 * found.std:.2f}"
    return f"{100 * found.mean:.2f}{spread} %"


def record(seeds: Sequence[Seed], evaluation: float | None) -> dict[str, Any]:
    """The figures as JSON values."""
    return {what: mean._asdict() for what, mean in figures(seeds, evaluation).items()}
