"""Times a speed recipe on this machine's GPUs or TPUs, and says where the time goes.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --data cifar10.npz --original airbench94_muon.py

The clock is that of the published scripts: from the whitening to the end of the last evaluation,
without compilation and without the copy of the images. It needs no dataset: without --data the
images are noise, which takes the same time, and the accuracy is not measured. The archive holds
train_images, train_labels, test_images and test_labels, as Keras caches CIFAR-10; "--data tfds"
loads what the config names. Results are written after each part. Fields of the config are set as
for train.py.

--original SCRIPT runs an original airbench script, given by its path, between two halves of our
runs. --runs-only leaves out the parts of a run. --quick tries the benchmark out on any machine,
with a narrow network and few images.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arrays, machine, report
from benchmarks.accelerator.peaks import peak
from benchmarks.accelerator.tables import Precision, Sitting, markdown, record
from benchmarks.accelerator.timed import (
    epoch_seconds,
    flop_of,
    make_experiment,
    profile,
    timed_run,
)
from benchmarks.command_line import Parser, command, log, names, positive
from benchmarks.speedrun import original
from benchmarks.workers import REPOSITORY
from cnn import Dataset, UserError, load_config, select_devices
from cnn.config import check_config, find_config, override, split_settings
from cnn.experiment import load_config_dataset
from cnn.runtime import cli
from cnn.runtime.jax_settings import pinned_settings

_MODULE = "benchmarks.accelerator"
_RESULTS = Path(__file__).resolve().parent / "results"
_DTYPES = ("float32", "bfloat16")
_NUM_TRAIN, _NUM_TEST = 50_000, 10_000  # of CIFAR-10
_QUICK = (
    "--config.model.widths=(4,)",
    "--config.model.conv_implementation=native",
    "--config.batch_size=32",
    "--config.num_epochs=2",
    "--config.runtime.eval_batch_size=64",
)
_QUICK_IMAGES = 96, 64
_LENGTHS = (1, 5)  # and an epoch


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags.

    Attributes:
      name: of the config.
      config: checked.
      data: an archive, "tfds", or "" for noise.
      dtypes: in turn; the first is compared with the original.
      seeds: warm runs.
      script: of the original, if any.
      original_runs: how many of the original's.
      runs_only: whether to leave out the parts.
      quick: whether to use few images.
      out: for the results.
      line: the command.
    """

    name: str
    config: Any
    data: str
    dtypes: list[str]
    seeds: int
    script: Path | None
    original_runs: int
    runs_only: bool
    quick: bool
    out: Path
    line: str


def _settings(argv: Sequence[str]) -> Settings:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--config", default="speed94", metavar="NAME", help="a config, by name or path (speed94)")
    add("--data", default="", metavar="FILE.npz", help='images, or "tfds" (noise)')
    add("--seeds", type=positive(int), metavar="N", help="warm runs of each precision (5)")
    add("--dtypes", type=names, default=list(_DTYPES), metavar="A,B", help=",".join(_DTYPES))
    add("--original", metavar="SCRIPT", help="path of an airbench script to run between ours")
    add("--original-runs", type=positive(int), metavar="N", help="(as many as ours)")
    add("--runs-only", action="store_true", help="whole runs, without the parts of one")
    add("--quick", action="store_true", help="seconds instead of minutes; the figures mean little")
    fields, words = split_settings(argv)
    flags = parser.parse_args(words)
    for dtype in flags.dtypes:
        if dtype not in _DTYPES:
            parser.error(f"unknown precision {dtype!r} in --dtypes; known: {', '.join(_DTYPES)}")
    path = find_config(flags.config, REPOSITORY / "configs")
    config = load_config(path)
    quick = _QUICK if flags.quick else ()
    line = command(_MODULE, [_named(word) for word in argv])
    seeds = flags.seeds or (2 if flags.quick else 5)
    return Settings(
        name=Path(path).stem,
        config=check_config(override(config, [*quick, *fields])),
        data=flags.data,
        dtypes=flags.dtypes,
        seeds=seeds,
        script=original.check_script(flags.original) if flags.original else None,
        original_runs=flags.original_runs or seeds,
        runs_only=flags.runs_only,
        quick=flags.quick,
        out=flags.out,
        line=line,
    )


def _named(word: str) -> str:
    """A word of the command, without folders of this machine."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name}" if os.sep in value else word


def _dataset(settings: Settings) -> Dataset:
    if settings.data == "tfds":
        return load_config_dataset(settings.config.to_dict())
    if settings.data:
        return arrays.read_arrays(settings.data)
    return arrays.random_dataset(*(_QUICK_IMAGES if settings.quick else (_NUM_TRAIN, _NUM_TEST)))


def _measure(
    settings: Settings,
    devices: list[Any],
    data: Dataset,
    sitting: Sitting,
    write: Callable[[], Any],
) -> None:
    """Measures one part after the other; the figures that matter most come first."""
    experiments = {
        dtype: make_experiment(settings.config, devices, data, dtype) for dtype in settings.dtypes
    }
    for dtype, experiment in experiments.items():
        images = experiment.num_steps * experiment.config.batch_size
        length = experiment.pipeline.steps_per_execution
        one = Precision(dtype, length, flop_of(experiment), images)
        sitting.precisions.append(one)
        log(f"{dtype}: the first run, which compiles")
        one.cold = timed_run(experiment, 0)
        is_beside = settings.script is not None and dtype == settings.dtypes[0]
        for seed in range(1, settings.seeds + 1):
            if is_beside and seed == settings.seeds // 2 + 1:
                _add_original(settings, devices, data, sitting)
            one.warm.append(timed_run(experiment, seed))
            log(f"{dtype}, seed {seed}: {one.warm[-1].seconds:.3f} s")
        one.again = timed_run(experiment, one.warm[0].seed)
        write()
    if settings.runs_only:
        return
    for one in sitting.precisions:
        log(f"{one.dtype}: parts of a run")
        one.parts = profile(experiments[one.dtype])
        write()
    first = sitting.precisions[0]
    experiment = experiments[first.dtype]
    for length in dict.fromkeys((*_LENGTHS, experiment.steps_per_epoch)):
        log(f"{first.dtype}: {length} steps in a call")
        first.lengths[length] = epoch_seconds(experiment, length)
        write()


def _add_original(settings: Settings, devices: list[Any], data: Dataset, sitting: Sitting) -> None:
    assert settings.script
    log(f"{settings.script.name}: {settings.original_runs} runs")
    variant = "gpu" if devices[0].platform == "gpu" else "channels_last"
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "images.npz"
        arrays.write_arrays(archive, data)
        sitting.script = settings.script.name
        sitting.originals = original.run(
            settings.script, archive, variant=variant, seed=0, runs=settings.original_runs
        )


def main(argv: Sequence[str]) -> None:
    """Flags -> parts -> results, written after each part."""
    settings = _settings(argv)
    if settings.script:
        # Else JAX would take most of a GPU's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime = settings.config.runtime
    devices = select_devices(
        runtime.platform, runtime.num_devices, deterministic=runtime.deterministic
    )
    if devices[0].platform == "cpu" and not settings.quick:
        raise UserError(
            "JAX finds no GPU or TPU here; add --quick to try the benchmark out on a CPU, or time "
            "a CPU with python -m benchmarks.speedrun"
        )
    with pinned_settings():
        data, kind = _dataset(settings), devices[0].device_kind
        used = make_experiment(settings.config, devices, data, "float32").mesh.size
        sitting = Sitting(kind, used, peak(kind), data.name, bool(settings.data))
        about = machine.describe()

        def write() -> str:
            text = markdown(sitting, settings.line, machine.sentence(about))
            name = re.sub(r"\W+", "_", f"{settings.name}_{kind}".lower()).strip("_")
            found = {
                "config": settings.name,
                "command": settings.line,
                "machine": about,
                **record(sitting),
            }
            report.write(settings.out, name, text, found)
            return text

        _measure(settings, devices, data, sitting, write)
    print(write())


if __name__ == "__main__":
    cli.run(main, interrupted="the parts that were finished are written")
