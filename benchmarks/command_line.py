"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from cnn import UserError

_Item = TypeVar("_Item")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for a mistake, with one line."""

    def __init__(self, script: str, description: str | None) -> None:
        super().__init__(
            prog=script,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """For argparse, and for what only the script itself can check."""
        raise UserError(f"{message}; python benchmarks/{self.prog} --help lists the flags")


def items(text: str, convert: Callable[[str], _Item]) -> list[_Item]:
    """What stands between the commas, each once."""
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

    convert.__name__ = "positive number"  # argparse names it when it refuses
    return convert


def command(script: str, argv: Sequence[str]) -> str:
    """The command without the place where results go: that is a path of this machine."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word.startswith("--out")):
            kept.append(word)
        skip = word == "--out"
    return " ".join([f"python benchmarks/{script}", *kept])


def log(line: str) -> None:
    """Progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None], *, interrupted: str) -> None:
    """`main(flags)`; what a person got wrong is one line and exit status 2.

    Args:
      main: of a script.
      interrupted: what is told after Ctrl-C.
    """
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        log(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        log(f"interrupted; {interrupted}")
        sys.exit(130)
