"""Compares this repository on a CPU with textbook Flax, PyTorch and Keras.

    pip install -e '.[bench]'
    python -m benchmarks.peers

All contenders train the same networks from the same weights on the same batches. Their losses are
compared first; a contender that computes something else is an error. Each contender has a process
of its own. The processes take turns, so that one works at a time, and each round starts with
another contender. The figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.command_line import Parser, command, items, log, names, positive
from benchmarks.peers.contenders.plain import PLAIN
from benchmarks.peers.contenders.problem import DTYPES, NETWORKS
from benchmarks.peers.lineup import GROUPS, MATMUL, REFERENCE, Contender, choose
from benchmarks.peers.rotation import Series, run_block
from benchmarks.peers.tables import all_variants, comparison, plot
from benchmarks.workers import QUICK_ENV
from cnn import UserError
from cnn.runtime import cli

_MODULE = "benchmarks.peers"
_RESULTS = Path(__file__).resolve().parent / "results"
# Network -> phase -> batch sizes.
_ROWS = {
    "baseline": {"train": (32, 128, 512), "infer": (512, 1000)},
    "net94": {"train": (128,), "infer": (512,)},
    "resnet18": {"train": (32, 128)},
    **{name: {"train": (32, 128)} for name in PLAIN},
}
_DEFAULT_NETWORKS = ("baseline", "net94")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags.

    Attributes:
      contenders: by network.
      blocks: (network, batch size) -> phases: what one set of processes measures.
      dtypes: of every block.
    """

    contenders: dict[str, list[Contender]]
    blocks: dict[tuple[str, int], list[str]]
    dtypes: list[str]
    rounds: int
    seconds: float
    out: Path


def _batches(text: str) -> list[int]:
    return items(text, positive(int))


def _settings(argv: Sequence[str]) -> Settings:
    parser = Parser(_MODULE, __doc__, _RESULTS)
    add = parser.add_argument
    add("--rounds", type=positive(int), metavar="N", help="samples of each (7)")
    add("--seconds", type=positive(float), metavar="S", help="of a sample (1.5)")
    known, default = ",".join(NETWORKS), ",".join(_DEFAULT_NETWORKS)
    add("--networks", type=names, metavar="A,B", help=f"of {known} ({default})")
    add("--batches", type=_batches, metavar="N,M", help="batch sizes, instead of each network's")
    add(
        "--dtypes",
        type=names,
        default=list(DTYPES[:1]),
        metavar="A,B",
        help=f"of {','.join(DTYPES)} (float32)",
    )
    groups = ",".join(GROUPS)
    add("--contenders", type=names, metavar="A,B", help=f"of {groups}, or a variant (all)")
    add("--quick", action="store_true", help="seconds instead of minutes; the figures mean little")
    flags = parser.parse_args(argv)
    networks = flags.networks or (["baseline"] if flags.quick else _DEFAULT_NETWORKS)
    for network in networks:
        if network not in NETWORKS:
            parser.error(f"unknown network {network!r}; known: {', '.join(NETWORKS)}")
    for dtype in flags.dtypes:
        if dtype not in DTYPES:
            parser.error(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    batches = flags.batches or ([16] if flags.quick else None)
    chosen = choose(flags.contenders or GROUPS)
    if flags.quick:
        chosen = [dataclasses.replace(one, env={**one.env, **QUICK_ENV}) for one in chosen]
    return Settings(
        contenders={network: _taking_part(chosen, network, flags.dtypes) for network in networks},
        blocks=_blocks(networks, batches),
        dtypes=flags.dtypes,
        rounds=flags.rounds or (2 if flags.quick else 7),
        seconds=flags.seconds or (0.05 if flags.quick else 1.5),
        out=flags.out,
    )


def _taking_part(
    contenders: Sequence[Contender], network: str, dtypes: Sequence[str]
) -> list[Contender]:
    found = [one for one in contenders if network in one.networks]
    for dtype in dtypes:
        if all(one.group == MATMUL for one in found if dtype in one.dtypes):
            raise UserError(
                f"none of these --contenders runs {network} in {dtype}; add {REFERENCE}"
            )
    return found


def _blocks(
    networks: Sequence[str], batches: Sequence[int] | None
) -> dict[tuple[str, int], list[str]]:
    blocks: dict[tuple[str, int], list[str]] = {}
    for network in networks:
        for phase, sizes in _ROWS[network].items():
            for batch_size in batches or sizes:
                blocks.setdefault((network, batch_size), []).append(phase)
    return blocks


def _write(settings: Settings, about: dict[str, Any], series: Sequence[Series], line: str) -> str:
    """Writes `peers.json`, `peers.md` and `peers.png`; returns the Markdown."""
    text = "\n".join(
        [
            f"`{line}`\n",
            f"{machine.sentence(about)}.\n",
            f"Medians of {settings.rounds} rounds of {settings.seconds:g} s, strictly in turns; in "
            "parentheses the lowest and highest round. The best variant of each peer counts.\n",
            f"{comparison(series)}\n",
            "All variants:\n",
            f"{all_variants(series)}\n",
        ]
    )
    record = {
        "command": line,
        "machine": about,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "series": [dataclasses.asdict(one) for one in series],
    }
    report.write(settings.out, "peers", text, record)
    plot(series, settings.out / "peers.png")
    return text


def main(argv: Sequence[str]) -> None:
    """Flags -> blocks of rows -> results, written after each block."""
    settings = _settings(argv)
    about = machine.describe()
    series: list[Series] = []
    text = ""
    for (network, batch_size), phases in settings.blocks.items():
        series += run_block(
            settings.contenders[network],
            network,
            batch_size,
            phases,
            settings.dtypes,
            rounds=settings.rounds,
            seconds=settings.seconds,
            log=log,
        )
        text = _write(settings, about, series, command(_MODULE, argv))
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="the rows that were finished are written")
