"""`python -m cnn COMMAND`: what one does before and after training."""

from __future__ import annotations

import importlib
import sys

from cnn.command_line import add_config_argument, parse_with_config
from cnn.commands import COMMANDS
from cnn.registry import select
from cnn.runtime import cli
from cnn.runtime.screen import tasks_reported_on
from cnn.runtime.signals import raise_on_signals

_PROGRAM = "python -m cnn"


def main(argv: list[str]) -> int | None:
    """Runs the command that the first word names, with the rest as its flags."""
    raise_on_signals()
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return None
    select("command", COMMANDS, name)
    command = importlib.import_module(f"cnn.commands.{name.replace('-', '_')}")
    parser = cli.Parser(f"{_PROGRAM} {name}", command.__doc__)
    command.add_arguments(parser)
    if getattr(command, "TAKES_CONFIG", False):
        add_config_argument(parser)
        arguments = parse_with_config(parser, rest)
    else:
        arguments = parser.parse_args(rest)
    with tasks_reported_on(sys.stderr):  # what a command prints is its result
        return command.run(arguments)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: {_PROGRAM} COMMAND ...\n\n{rows}\n\n"
        f"{_PROGRAM} COMMAND --help describes a command. Training: python train.py --help"
    )


if __name__ == "__main__":
    cli.run(main, interrupted="what was written before is complete", prints_result=True)
