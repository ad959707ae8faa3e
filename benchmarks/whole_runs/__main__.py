"""Times whole processes from a cold start: `train.py` with some configs, and the Keras script.

    pip install -e '.[bench]'
    python -m benchmarks.whole_runs

One process runs at a time, in turns over the seeds. A clock outside the process reads when the line
of each epoch arrives, hence when the test accuracy first reaches 63.44 %. Finished runs are kept in
`whole_runs.jsonl`; the same command continues after them, unless the code they ran has changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.command_line import Parser, positive
from benchmarks.whole_runs.runs import (
    KERAS,
    TARGET,
    Run,
    finished,
    load_runs,
    summary,
    timed,
    write_arrays,
)
from benchmarks.workers import REPOSITORY
from cnn import UserError
from cnn.runtime import cli

_MODULE = "benchmarks.whole_runs"
_KERAS_SCRIPT = Path(__file__).resolve().parent / "keras_script.py"
_RESULTS = Path(__file__).resolve().parent / "results"
_DEFAULT_RUNS = f"{KERAS},configs/baseline.py,configs/fast_cpu.py"


def code_digest(run: str, about: dict[str, Any]) -> str:
    """Digest of the files, the versions and the processor on which a run depends."""
    files = [_KERAS_SCRIPT]
    if run != KERAS:
        # Other configs start from the baseline's.
        files = [Path(run), REPOSITORY / "configs" / "baseline.py", REPOSITORY / "train.py"]
        files += sorted((REPOSITORY / "cnn").rglob("*.py"))
    place = [about["cpu"], about["cores"], about["versions"]]
    digest = hashlib.sha256(json.dumps(place).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def command_of(run: str, seed: int, data: Path, workdir: Path) -> list[str]:
    """The command of a run."""
    if run == KERAS:
        arguments = [str(_KERAS_SCRIPT), f"--data={data}", f"--seed={seed}"]
    else:
        arguments = [str(REPOSITORY / "train.py"), f"--config={run}", f"--config.seed={seed}"]
    return [sys.executable, *arguments, f"--workdir={workdir}"]


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--repeats", type=positive(int), default=5, metavar="N", help="seeds 0 to N-1 (5)")
    add("--runs", default=_DEFAULT_RUNS, metavar="A,B", help=f"configs, and {KERAS} (%(default)s)")
    add("--warm-cache", action="store_true", help="let JAX use what earlier processes compiled")
    flags = parser.parse_args(argv)
    flags.runs = [run if run == KERAS else _config(run) for run in flags.runs.split(",")]
    return flags


def _config(name: str) -> str:
    path = next((path for path in (Path(name), REPOSITORY / name) if path.is_file()), None)
    if path is None:
        raise UserError(f"config file {name} does not exist; --runs lists configs and {KERAS!r}")
    return str(path.resolve())


def _name(run: str) -> str:
    return KERAS if run == KERAS else Path(run).stem


def _measure(run: str, seed: int, code: str, data: Path, warm_cache: bool) -> Run:
    with tempfile.TemporaryDirectory() as place:
        env = {} if warm_cache else {"JAX_COMPILATION_CACHE_DIR": f"{place}/cache"}
        found = timed(command_of(run, seed, data, Path(place) / "run"), env)
    return Run(name=_name(run), seed=seed, code=code, warm_cache=warm_cache, **found)


def _command(flags: argparse.Namespace) -> str:
    """The command without `--out`, and with configs by name: no path of this machine."""
    inside = REPOSITORY / "configs"
    runs = [
        f"configs/{Path(run).name}" if Path(run).parent == inside else Path(run).name
        for run in flags.runs
    ]
    warm = " --warm-cache" if flags.warm_cache else ""
    return f"python -m {_MODULE} --repeats={flags.repeats} --runs={','.join(runs)}{warm}"


def _write(flags: argparse.Namespace, runs: Sequence[Run], about: dict[str, Any]) -> str:
    cache = "with" if flags.warm_cache else "without"
    command = _command(flags)
    text = "\n".join(
        [
            f"`{command}`\n",
            f"{machine.sentence(about)}.\n",
            "Whole processes one at a time, start included, data prepared before, "
            f"{cache} a warm compilation cache. Seconds: median (lowest to highest); "
            "ratios: of the means.\n",
            f"{summary(runs)}\n",
        ]
    )
    record = {
        "command": command,
        "machine": about,
        "target": TARGET,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    report.write(flags.out, "whole_runs", text, record)
    return text


def _prepare(data: Path) -> None:
    # In a process of its own, since the peak memory of a child starts at its parent's.
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as processes:
        processes.submit(write_arrays, data).result()


def main(argv: Sequence[str]) -> None:
    """Makes the missing runs, seed by seed, and writes the table after each."""
    flags = _flags(argv)
    flags.out.mkdir(parents=True, exist_ok=True)
    kept = flags.out / "whole_runs.jsonl"
    about = machine.describe()
    runs: list[Run] = []
    text = ""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "cifar10.npz"
        if KERAS in flags.runs:
            _prepare(data)
        for seed in range(flags.repeats):
            turn = seed % len(flags.runs)
            for run in (*flags.runs[turn:], *flags.runs[:turn]):
                code, before = code_digest(run, about), load_runs(kept)
                one = finished(before, _name(run), seed, code, flags.warm_cache)
                if one is None:
                    one = _measure(run, seed, code, data, flags.warm_cache)
                    with kept.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(one)) + "\n")
                runs.append(one)
                print(f"{one.name}, seed {seed}: {one.wall_seconds:.1f} s", flush=True)
                text = _write(flags, runs, about)
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="the same command continues")
