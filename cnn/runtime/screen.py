"""Standard output and standard error: lines, one live line below them, and what takes a while.

On a terminal the live line is redrawn in place. In files and pipes there are plain lines only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from cnn.errors import one_line

_T = TypeVar("_T")
_MOST_COLUMNS = 79
_PATIENCE = 0.5  # seconds that need no explanation
_LIVE_PERIOD, _PLAIN_PERIOD = 0.2, 30.0  # seconds between two lines that say where something is
_STYLES = {"bold": "1", "green": "32", "yellow": "33"}
# To the end of the screen: a terminal that has become narrower has broken the line into rows.
_CLEAR = "\r\x1b[J"

# Reentrant: a signal handler may write while the main thread writes.
_lock = threading.RLock()
_live: tuple[str, TextIO | None] | None = None  # what the live line is, and where


def is_live(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default standard output, is a terminal that can redraw a line."""
    return _is_terminal(stream or sys.stdout) and os.environ.get("TERM") != "dumb"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def width(stream: TextIO | None = None) -> int:
    """Columns that a line may have now: at most 79, and one less than the terminal has.

    Args:
      stream: on which; by default standard output.
    """
    stream, columns = stream or sys.stdout, 0
    if stream is not None and _is_terminal(stream):
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(stream.fileno()).columns
    # A terminal that does not know its size has zero columns.
    return min(_MOST_COLUMNS, (columns or _MOST_COLUMNS + 1) - 1)


def styled(text: str, style: str) -> str:
    """A text in a style of `_STYLES`, where standard output shows them and NO_COLOR is unset."""
    if not is_live() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def shown(path: Path) -> str:
    """A path as it is shortest: relative to the working directory, if it is within."""
    with contextlib.suppress(OSError, ValueError):  # it is elsewhere, or there is none
        return str(path.relative_to(Path.cwd()))
    return str(path)


def log(text: str) -> None:
    """Prints lines to standard output, above the live line; a terminal's are folded at blanks."""
    _print(text, sys.stdout)


def log_warning(text: str) -> None:
    """Prints a warning to standard error, above the live line."""
    label = "warning:"
    _print(f"{styled(label, 'yellow') if is_live(sys.stderr) else label} {text}", sys.stderr)


@contextlib.contextmanager
def warning_on_failure(what: str) -> Iterator[None]:
    """Turns any error within it into a warning, for what is never worth a run.

    Args:
      what: the consequence, such as "the environment is not recorded".
    """
    try:
        yield
    except Exception as error:
        log_warning(one_line(f"{what} ({error or type(error).__name__})"))


def live(text: str) -> None:
    """Draws the live line; "" removes it. Does nothing where there is no terminal.

    Args:
      text: cut to the width that the terminal has now.
    """
    _draw(text, sys.stdout)


def _draw(text: str, stream: TextIO | None) -> None:
    global _live
    with _lock:
        if is_live(stream) and (text or _live):
            _live = (text, stream) if text else None
            # The cursor waits at the beginning, where other programs' messages then begin.
            _write(stream, f"{_CLEAR}{text[: width(stream)]}\r")


def _print(text: str, stream: TextIO | None) -> None:
    with _lock:
        if kept := _live:
            _draw("", kept[1])
        lines = text.split("\n")
        if _is_terminal(stream):
            lines = [folded for line in lines for folded in _fold(line, width(stream))]
        _write(stream, "".join(f"{line}\n" for line in lines))
        if kept:
            _draw(*kept)


def _write(stream: TextIO | None, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it is full, or closed
        if stream is not None:
            stream.write(text)
            stream.flush()


def _fold(line: str, columns: int) -> list[str]:
    """A line cut at blanks to the width of the terminal; longer words stay whole."""
    if len(line) <= columns or "\x1b" in line:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line,
        columns,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


@dataclasses.dataclass
class Task:
    """Something that takes a while.

    Attributes:
      what: it is, such as "decoding cifar10 train".
      stream: where it is reported.
      detail: how far it is; may be set at any time.
      begun: on the monotonic clock.
    """

    what: str
    stream: TextIO | None
    detail: str = ""
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def text(self) -> str:
        """One line on the task while it is running."""
        return " ".join(filter(None, (self.what, "...", self.detail)))


_tasks: list[Task] = []  # the innermost last


@contextlib.contextmanager
def waiting(what: str, stream: TextIO | None = None) -> Iterator[Task]:
    """Within it, a person learns what is running if it takes longer than half a second.

    On a terminal the live line says it, with the seconds so far. In a file a line says it, and
    another one each half minute. A last line says how long it took. The innermost of nested tasks
    is shown.

    Args:
      what: is done, such as "compiling the training step".
      stream: where it is reported, if this is the outermost task; by default standard output.
    """
    # The stream of now: a library may be silenced within by redirecting standard output.
    task = Task(what, _tasks[-1].stream if _tasks else stream or sys.stdout)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(task, over), daemon=True)
    _tasks.append(task)
    thread.start()
    try:
        yield task
    finally:
        over.set()
        thread.join()
        _tasks.remove(task)
        _draw("", task.stream)
    if (seconds := time.monotonic() - task.begun) > _PATIENCE:
        _print(f"{what}: {seconds:.1f} s", task.stream)


def _watch(task: Task, over: threading.Event) -> None:
    """In a thread: reports a task until it is over."""
    period = _PATIENCE
    while not over.wait(period):
        is_terminal = is_live(task.stream)
        period = _LIVE_PERIOD if is_terminal else _PLAIN_PERIOD
        if _tasks[-1] is not task:
            continue
        if is_terminal:
            _draw(f"{task.text()}  {time.monotonic() - task.begun:.0f} s", task.stream)
        else:
            _print(task.text(), task.stream)


def counted(items: Iterable[_T], task: Task, total: int, unit: str) -> Iterator[_T]:
    """The items, while the task's detail says how many of the total have passed.

    >>> task = Task("decoding", None)
    >>> [task.text() for _ in counted("ab", task, 1000, "images")]
    ['decoding ... 1 of 1,000 images', 'decoding ... 2 of 1,000 images']
    """
    for number, item in enumerate(items, 1):
        task.detail = f"{number:,} of {total:,} {unit}"
        yield item
