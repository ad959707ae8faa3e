"""Flags that several benchmarks share, and the command as their results name it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cnn.runtime import cli

_Item = TypeVar("_Item")


class Parser(cli.Parser):
    """The parser of a benchmark, with the flag `--out`.

    Args:
      module: the benchmark, as `python -m` takes it.
      description: for `--help`.
      out: the folder for results if `--out` does not name another.
    """

    def __init__(self, module: str, description: str | None, out: Path) -> None:
        super().__init__(f"python -m {module}", description)
        self.add_argument(
            "--out", type=Path, default=out, metavar="DIR", help="(results/ beside the benchmark)"
        )


def items(text: str, convert: Callable[[str], _Item]) -> list[_Item]:
    """The values between the commas, without repetitions.

    >>> items("3, 1,3", int)
    [3, 1]
    """
    return list(dict.fromkeys(convert(item.strip()) for item in text.split(",")))


def names(text: str) -> list[str]:
    """For `type=` of a flag that lists names."""
    return items(text, str)


def positive(kind: Callable[[str], _Item]) -> Callable[[str], _Item]:
    """For `type=` of a flag that is a count or a time."""

    def convert(text: str) -> _Item:
        value: Any = kind(text)
        if not 0 < value < 1e6:
            raise ValueError
        return value

    convert.__name__ = "positive number"  # argparse's message names the type
    return convert


def command(module: str, argv: Sequence[str]) -> str:
    """The command without `--out`, whose value is a path of the machine.

    >>> command("benchmarks.peers", ["--quick", "--out", "/tmp/results"])
    'python -m benchmarks.peers --quick'
    """
    kept, skip = [], False
    for word in argv:
        if not (skip or word.startswith("--out")):
            kept.append(word)
        skip = word == "--out"
    return " ".join([f"python -m {module}", *kept])


def log(line: str) -> None:
    """Prints a line of progress to standard error; results go to standard output."""
    print(line, file=sys.stderr, flush=True)
