"""The command line of a run: a config, fields of it and a run directory; and what to type next."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnn.config import (
    as_flags,
    check_config,
    comments,
    fields,
    find_config,
    flatten,
    load_config,
    override,
    split_settings,
)
from cnn.members import is_group
from cnn.registry import REQUIRED
from cnn.runtime.cli import Parser, shell_command
from cnn.runtime.disk import resolve_path
from cnn.runtime.screen import shown

_EPILOG = """\
A field is set as --config.FIELD=VALUE or --config.FIELD VALUE; a boolean alone
is true.

examples:
  python train.py --config digits      under a minute, nothing to download
  python train.py --config.batch_size=128 --config.optimizer.learning_rate=2e-3
  python train.py --config configs/digits.py --config.seed=1 --workdir runs/1
  python train.py --config digits --config.num_seeds=5 --workdir runs/five
  python train.py --config digits --config.num_seeds=3 --workdir runs/rates \\
      --config.sweep.optimizer.learning_rate="(1e-3, 3e-3, 1e-2)"
"""
_METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT", tuple: "TUPLE"}


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """What the flags of a run ask for.

    Attributes:
      config: checked, with the fields that the flags set.
      workdir: the run directory.
      base: the config before the flags set fields of it.
      name: the config as `--config` takes it.
      program: the words of the command before its flags.
    """

    config: Any
    workdir: Path
    base: ConfigDict
    name: str
    program: list[str]

    def next_commands(self) -> str:
        """Commands to type after the run: TensorBoard if it was written, scores, another seed."""
        if is_group(self.config):
            return self._next_commands_of_group()
        lines = []
        if flatten(self.config)["runtime.tensorboard"]:
            lines.append("curves of all runs beside this one:")
            lines.append(shell_command(["tensorboard"], ("--logdir", shown(self.workdir.parent))))
        lines.append("next, its accuracy by class, its confusions and its worst mistakes:")
        evaluate = [*self.program[:1], "-m", "cnn", "evaluate", shown(self.workdir)]
        lines.append(shell_command(evaluate))
        seed, workdir = _next_seed(flatten(self.config)["seed"], self.workdir)
        changed = as_flags(override(self.config, [f"--config.seed={seed}"]), self.base)
        flags = ("--config", self.name), ("--workdir", shown(workdir))
        lines.append("another seed shows how much the result varies:")
        lines.append(shell_command([*self.program, *changed], *flags))
        return "\n".join(lines)

    def _next_commands_of_group(self) -> str:
        more = override(self.config, [f"--config.num_seeds={2 * self.config.num_seeds}"])
        flags = ("--config", self.name), ("--workdir", shown(self.workdir))
        words = [*self.program, *as_flags(more, self.base)]
        compare = [*self.program[:1], "-m", "cnn", "compare", shown(self.workdir), "OTHER"]
        return "\n".join(
            (
                "more seeds, of which only the new ones are trained:",
                shell_command(words, *flags),
                "how sure the difference to another run or group is:",
                shell_command(compare),
            )
        )


def parse(argv: Sequence[str], description: str | None, home: Path) -> RunFlags:
    """Reads the flags of a run; `--help` prints the fields of the config and exits.

    Args:
      argv: the words after the program's name.
      description: of the program, for `--help`.
      home: the folder with `configs/`, and by default with the run directory, in `checkpoints/`.

    Raises:
      UserError: an unknown flag or field, or a config that `check_config` refuses.
    """
    configs = home / "configs"
    parser = _parser(description, configs)
    flags, rest = parser.parse_known_args(argv)
    if flags.help:
        base = load_config(find_config(flags.config, configs))
        _add_fields(parser, base, comments((configs / "baseline.py").read_text()))
        parser.print_help()
        parser.exit()
    if flags.workdir == "":
        parser.error("--workdir is empty")
    chosen = choose_config(flags.config, rest, home)
    program = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if [*program, *argv] != sys.orig_argv:  # it is called from Python
        program = ["python", "train.py"]
    return RunFlags(
        config=chosen.config,
        workdir=resolve_path(flags.workdir or home / "checkpoints" / chosen.path.stem),
        base=chosen.base,
        name=chosen.name,
        program=program,
    )


@dataclasses.dataclass(frozen=True)
class ChosenConfig:
    """A config from the command line.

    Attributes:
      config: checked, with the fields that flags set.
      base: the config before that.
      path: of its file.
      name: the config as `--config` takes it.
    """

    config: Any
    base: ConfigDict
    path: Path
    name: str

    def train_command(self, *changes: str) -> str:
        """The command of `train.py` for this config.

        Args:
          *changes: further flags that set fields.
        """
        flags = as_flags(override(self.config, list(changes)), self.base)
        return shell_command(["python", "train.py"], ("--config", self.name), *([f] for f in flags))


def choose_config(name: str, settings: Sequence[str], home: Path) -> ChosenConfig:
    """Loads and checks a config that a command line names.

    Args:
      name: the path of a config, or the name of one in `configs/`.
      settings: flags that set fields of it.
      home: the folder with `configs/`.

    Raises:
      UserError: there is no such config, an unknown flag or field, or a value that is refused.
    """
    configs = home / "configs"
    path = find_config(name, configs)
    base = load_config(path)
    config = check_config(override(base, settings))
    return ChosenConfig(config, base, path, path.stem if path.parent == configs else str(path))


def add_config_argument(parser: Parser) -> None:
    """Adds CONFIG, for a command that `parse_with_config` is called for."""
    parser.add_argument(
        "config",
        nargs="?",
        default="baseline",
        metavar="CONFIG",
        help="a config's file, or its name in configs/ (default: baseline); its fields are set as "
        "--config.FIELD=VALUE, and python train.py --config CONFIG --help lists them",
    )


def parse_with_config(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Reads the flags of a command that takes a config; `chosen` becomes the `ChosenConfig`.

    Args:
      parser: with the argument of `add_config_argument`.
      argv: the words after the command's name.

    Raises:
      UserError: as for `choose_config`, or for a flag that the parser does not know.
    """
    # Not by argparse, to which the value in `--config.seed 3` would be CONFIG.
    settings, rest = split_settings(argv)
    arguments = parser.parse_args(rest)
    arguments.chosen = choose_config(arguments.config, settings, _home())
    return arguments


def _home() -> Path:
    """The folder with `configs/`: that of train.py if the package lies beside it."""
    beside = Path(__file__).resolve().parents[1]
    return beside if (beside / "train.py").is_file() else Path.cwd()


def _parser(description: str | None, configs: Path) -> Parser:
    parser = Parser(
        "python train.py",
        description,
        usage="train.py [--config CONFIG] [--workdir DIR] [--config.FIELD=VALUE ...]",
        epilog=_EPILOG,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this help and exit; defaults are CONFIG's"
    )
    parser.add_argument(
        "--config",
        default="baseline",
        metavar="CONFIG",
        help="a Python file with a get_config() function, or the name of one in configs/: "
        f"{', '.join(sorted(path.stem for path in configs.glob('*.py')))} (default: baseline)",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run directory (default: checkpoints/CONFIG/ beside train.py)",
    )
    return parser


def _add_fields(parser: Parser, config: ConfigDict, meanings: dict[str, str]) -> None:
    """Adds every field of the config to the help, in sections."""
    values, sections = flatten(config), {}
    for name, field in fields(config).items():
        sections.setdefault(name.rpartition(".")[0] or "run", []).append((name, field))
    for section, members in sections.items():
        group = parser.add_argument_group(section)
        # The name first: it decides which other fields there are.
        for name, field in sorted(members, key=lambda member: not member[0].endswith(".name")):
            default = values.get(name, field.default)
            shown_default = "none" if default is REQUIRED else repr(default)
            meaning = " ".join(filter(None, (meanings.get(name), field.doc)))
            text = f"{meaning} (default: {shown_default})".strip()
            metavar = _METAVARS.get(field.type, "VALUE")
            group.add_argument(f"--config.{name}", metavar=metavar, help=text.replace("%", "%%"))


def _next_seed(seed: int, workdir: Path) -> tuple[int, Path]:
    """A seed for another run, and a directory for it that does not exist yet."""
    stem = workdir.name.removesuffix(f"-seed{seed}")
    while True:
        seed = (seed + 1) % 2**32
        place = workdir.parent / f"{stem}-seed{seed}"
        if not os.path.exists(place):  # Path's own raises where a name is too long
            return seed, place
