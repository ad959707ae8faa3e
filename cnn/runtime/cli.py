"""What command lines share: a strict parser, exit codes instead of tracebacks, a quiet screen."""

from __future__ import annotations

import argparse
import errno
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jax.errors import JaxRuntimeError

from cnn.errors import Interrupted, UserError, one_line
from cnn.runtime.screen import width
from cnn.runtime.streams import lenient_streams, warn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that accepts no abbreviated flags and keeps the lines of its texts.

    Args:
      prog: the command as one types it, such as "python train.py"; error messages name it.
      description: for `--help`.
      **options: of `ArgumentParser`.
    """

    def __init__(self, prog: str, description: str | None, **options: Any) -> None:
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog, description=description, **options)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with the message and where the flags are listed."""
        raise UserError(f"{message}; {self.prog} --help lists the flags")


class ActionParser(Parser):
    """The parser of an action of a command, such as that of `data show`.

    It refuses what it does not know itself, so that the message names it and not the command.
    """

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Reads the flags; nothing is left over."""
        found, rest = super().parse_known_args(*args, **options)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def run(
    main: Callable[[list[str]], int | None],
    *,
    interrupted: str = "the same command resumes the run",
    prints_result: bool = False,
) -> None:
    """Calls `main` with the flags of this process, and exits with a code if it fails.

    `UserError`, `OSError` and a device that runs out of memory are one line on standard error and
    exit code 2. `Interrupted` exits with 128 + its signal, and Ctrl-C with 130. Any other exception
    is a bug and keeps its traceback. Output that cannot be written is dropped.

    Args:
      main: a program that takes the words after its name, and returns its exit code or None for 0.
      interrupted: what Ctrl-C means for the program's results.
      prints_result: whether its result is what it prints: exit code 2 then says that this could not
        be written, unless its reader has gone. Else that is a warning.
    """
    # Orbax and TFDS log through absl what does not concern the user of a program, and asyncio logs
    # the second of two writes that fail at once: the first is the error that is reported.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _hide_pending_writes
    lost: list[OSError] = []
    with lenient_streams(lost.append if prints_result else warn):
        code = _exit_code(main, interrupted)
    if lost and lost[0].errno != errno.EPIPE:
        reason = lost[0].strerror or type(lost[0]).__name__
        print(f"error: standard output could not be written ({reason})", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[list[str]], int | None], interrupted: str) -> int:
    """Calls `main`, and turns what it raises into a line and an exit code."""
    try:
        return main(sys.argv[1:]) or 0
    except (UserError, OSError) as error:
        code, line = 2, f"error: {one_line(str(error))}"
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = one_line(str(error).splitlines()[0])
        advice = "choose a smaller batch_size, eval_batch_size or model"
        code, line = 2, f"error: not enough memory ({reason}); {advice}"
    except Interrupted as stop:
        code, line = 128 + stop.signal, str(stop)
    except KeyboardInterrupt:
        code, line = 128 + signal.SIGINT, f"interrupted; {interrupted}"
    print(line, file=sys.stderr)
    return code


def _hide_pending_writes(unraisable: UnraisableHookArgs) -> None:
    """Hides the "Event loop is closed" lines that TensorStore prints after a failed save.

    There is one for each write that was pending. Other exceptions are shown as usual.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def shell_command(words: Sequence[str], *flags: Sequence[str]) -> str:
    r"""A command for the shell, quoted, and broken into lines that fit the screen.

    Args:
      words: may be separated by a line break.
      flags: each a flag and its value, which stay on one line.

    >>> print(shell_command(["python", "train.py"], ("--workdir", "my run")))
      python train.py --workdir 'my run'
    """
    lines = [""]
    for part in (*map(shlex.quote, words), *map(shlex.join, flags)):
        if lines[-1] and len(lines[-1]) + len(part) + 7 > width():
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return "  " + " \\\n    ".join(lines)
