"""Trains an image classifier: on CIFAR-10, or as another config says.

The same command again continues the run, or says that it is finished.
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none, gone, or closed
        if sys.stdout.isatty():
            print("importing JAX ...", end="\r", flush=True)  # the first line of the run covers it
try:
    from jax.errors import JaxRuntimeError

    from cnn.config import (
        FIELDS,
        as_flags,
        check_config,
        comments,
        find_config,
        flatten,
        load_config,
        override,
    )
    from cnn.errors import Interrupted, UserError, one_line
    from cnn.notes import without_effect
    from cnn.runtime.disk import resolve_path
    from cnn.runtime.screen import log, shown, width
    from cnn.runtime.signals import raise_on_signals
    from cnn.runtime.streams import lenient_streams
    from cnn.training import train_and_evaluate
except KeyboardInterrupt:
    sys.exit(130)
except ValueError as error:  # JAX and others read their variables as they are imported
    named = " named JAX_..." if "jax" in str(error).lower() else ""
    print(f"error: {error}; look at the environment variables{named}", file=sys.stderr)
    sys.exit(2)

_HERE = Path(__file__).resolve().parent
_CONFIGS = _HERE / "configs"
_EPILOG = """\
A field is set as --config.FIELD=VALUE or --config.FIELD VALUE; a boolean alone
is true.

examples:
  python train.py --config digits      under a minute, nothing to download
  python train.py --config.batch_size=128 --config.optimizer.learning_rate=2e-3
  python train.py --config configs/digits.py --config.seed=1 --workdir runs/1
"""
_METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT", tuple: "TUPLE"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python train.py --help lists the flags")


def main(argv: list[str]) -> None:
    """Flags -> config -> `train_and_evaluate`."""
    parser = _Parser(
        prog="train.py",
        usage="train.py [--config CONFIG] [--workdir DIR] [--config.FIELD=VALUE ...]",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        f"{', '.join(sorted(path.stem for path in _CONFIGS.glob('*.py')))} (default: baseline)",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run directory (default: checkpoints/CONFIG/ beside train.py)",
    )
    flags, rest = parser.parse_known_args(argv)
    path = find_config(flags.config, _CONFIGS)
    base = load_config(path)
    if flags.help:
        _add_fields(parser, flatten(base))
        parser.print_help()
        return
    if flags.workdir == "":
        parser.error("--workdir is empty")
    workdir = flags.workdir or _HERE / "checkpoints" / path.stem
    config = check_config(override(base, rest))
    given = [flag.partition("=")[0].removeprefix("--config.") for flag in rest]
    for line in without_effect(flatten(config), given):
        log(f"note: {line}")
    try:
        train_and_evaluate(config, workdir)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory ({str(error).splitlines()[0]}); choose a smaller batch_size, "
            f"eval_batch_size or model"
        ) from error
    if config.tensorboard:
        log("curves of all runs beside this one:")
        log(_command(["tensorboard"], ("--logdir", shown(resolve_path(workdir).parent))))
    log("next, another seed shows how much the result varies:")
    program = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if [*program, *argv] != sys.orig_argv:  # it is called from Python
        program = ["python", "train.py"]
    name = path.stem if path.parent == _CONFIGS else str(path)
    seed, place = _next_seed(flatten(config)["seed"], resolve_path(workdir))
    changed = as_flags(override(config, [f"--config.seed={seed}"]), base)
    flags = ("--config", name), ("--workdir", shown(place))
    log(_command([*program, *changed], *flags))


def _next_seed(seed: int, workdir: Path) -> tuple[int, Path]:
    """A seed for another run, and a directory for it that is not there yet."""
    stem = workdir.name.removesuffix(f"-seed{seed}")
    while True:
        seed = (seed + 1) % 2**32
        place = workdir.parent / f"{stem}-seed{seed}"
        if not os.path.exists(place):  # Path's own raises where a name is too long
            return seed, place


def _command(words: list[str], *flags: tuple[str, str]) -> str:
    """A command for the shell, in lines that fit the screen if its parts do."""
    lines = [""]
    for part in (*map(shlex.quote, words), *map(shlex.join, flags)):
        if lines[-1] and len(lines[-1]) + len(part) + 7 > width():
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return "  " + " \\\n    ".join(lines)


def _add_fields(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Adds every config field for the help, in sections."""
    said = comments((_CONFIGS / "baseline.py").read_text())
    groups = {}
    for name, field in FIELDS.items():
        section = name.rpartition(".")[0] or "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        text = f"{said.get(name, '')} (default: {defaults.get(name, 'none')!r})"
        groups[section].add_argument(
            f"--config.{name}", metavar=_METAVARS[field.kind], help=text.replace("%", "%%")
        )


def _hush(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides the "Event loop is closed" of TensorStore's pending writes after a failed save."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    # Orbax and TFDS say much that is no concern of the person at the screen.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _hush
    raise_on_signals()
    with lenient_streams():
        try:
            main(sys.argv[1:])
        except (UserError, OSError) as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            print("interrupted; the same command continues the run", file=sys.stderr)
            sys.exit(130)
