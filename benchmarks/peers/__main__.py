"""Compares this repository on a CPU with textbook Flax, PyTorch and Keras, in one run.

    pip install -e '.[bench]'
    python benchmarks/peers.py

All train the same networks from the same weights on the same batches; that their losses agree is
checked first. Each contender has a process of its own, and one at a time works: in turns, several
rounds, each round begun by another. The figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
import machine
from contenders import CONTENDERS, MATMUL, REFERENCE, Contender, choose
from contenders.problem import NETWORKS, PHASES
from rotation import Series, run_block
from tables import comparison, everybody, plot

from cnn import UserError

_RESULTS = Path(__file__).resolve().parent / "results"
# Network -> phase -> batch sizes.
_ROWS = {
    "seed": {"train": (32, 128, 512), "infer": (512, 1000)},
    "net94": {"train": (128,), "infer": (512,)},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, from the flags."""

    contenders: list[Contender]
    blocks: dict[tuple[str, int], list[str]]
    rounds: int
    seconds: float
    out: Path


def _batches(text: str) -> list[int]:
    return cli.items(text, cli.positive(int))


def _settings(argv: Sequence[str]) -> Settings:
    parser = cli.Parser("peers.py", __doc__)
    groups = ",".join(dict.fromkeys(contender.group for contender in CONTENDERS))
    add = parser.add_argument
    add("--rounds", type=cli.positive(int), metavar="N", help="samples of each (7)")
    add("--seconds", type=cli.positive(float), metavar="S", help="of a sample (1.5)")
    add("--networks", type=cli.names, metavar="A,B", help=f"of {','.join(NETWORKS)} (all)")
    add("--batches", type=_batches, metavar="N,M", help="batch sizes, instead of each network's")
    add("--contenders", type=cli.names, metavar="A,B", help=f"of {groups}, or a variant (all)")
    add("--quick", action="store_true", help="seconds instead of minutes; the figures mean little")
    add("--out", type=Path, default=_RESULTS, metavar="DIR", help="(benchmarks/results)")
    flags = parser.parse_args(argv)
    networks = flags.networks or (["seed"] if flags.quick else list(NETWORKS))
    for network in networks:
        if network not in NETWORKS:
            parser.error(f"unknown network {network!r}; known: {', '.join(NETWORKS)}")
    batches = flags.batches or ([16] if flags.quick else None)
    return Settings(
        contenders=choose(flags.contenders or groups.split(",")),
        blocks=_blocks(networks, batches),
        rounds=flags.rounds or (2 if flags.quick else 7),
        seconds=flags.seconds or (0.05 if flags.quick else 1.5),
        out=flags.out,
    )


def _blocks(
    networks: Sequence[str], batches: Sequence[int] | None
) -> dict[tuple[str, int], list[str]]:
    """(network, batch size) -> phases: what one set of processes measures."""
    blocks: dict[tuple[str, int], list[str]] = {}
    for network in networks:
        for phase in PHASES:
            for batch_size in batches or _ROWS[network][phase]:
                blocks.setdefault((network, batch_size), []).append(phase)
    return blocks


def _write(
    settings: Settings, about: dict[str, Any], series: Sequence[Series], command: str
) -> str:
    """Writes `peers.json`, `peers.md` and `peers.png`; returns the Markdown."""
    text = "\n".join(
        [
            f"`{command}`\n",
            f"{machine.sentence(about)}.\n",
            f"Medians of {settings.rounds} rounds of {settings.seconds:g} s, strictly in turns; in "
            "brackets the lowest and highest round. The best variant of each peer counts.\n",
            f"{comparison(series)}\n",
            "All variants:\n",
            f"{everybody(series)}\n",
        ]
    )
    record = {
        "command": command,
        "machine": about,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "series": [dataclasses.asdict(one) for one in series],
    }
    (settings.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    (settings.out / "peers.md").write_text(text)
    plot(series, settings.out / "peers.png")
    return text


def main(argv: Sequence[str]) -> None:
    """Flags -> blocks of rows -> results, written after each block."""
    settings = _settings(argv)
    names = [one.name for one in settings.contenders if one.group != MATMUL]
    if not names:
        raise UserError("matmul alone compares nothing; add contenders")
    settings.out.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    series: list[Series] = []
    text = ""
    for (network, batch_size), phases in settings.blocks.items():
        series += run_block(
            settings.contenders,
            network,
            batch_size,
            phases,
            reference=REFERENCE if REFERENCE in names else names[0],
            rounds=settings.rounds,
            seconds=settings.seconds,
            log=cli.log,
        )
        text = _write(settings, about, series, cli.command("peers.py", argv))
    print(text)


if __name__ == "__main__":
    cli.run(main, interrupted="the rows that were finished are written")
