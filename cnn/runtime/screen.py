"""Standard output and standard error: lines, one live line below them, and long tasks.

On a terminal the live line is redrawn in place. Files and pipes get plain lines only.
"""

from __future__ import annotations

import contextlib
import contextvars
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
_PATIENCE = 0.5  # seconds; a task that takes longer is announced
_LIVE_PERIOD, _PLAIN_PERIOD = 0.2, 30.0  # seconds between two reports of a task
_STYLES = {"bold": "1", "green": "32", "yellow": "33"}
# Clears to the end of the screen: a terminal that became narrower has wrapped the line.
_CLEAR = "\r\x1b[J"

# Reentrant: a signal handler may write while the main thread writes.
_lock = threading.RLock()
_live: tuple[str, TextIO | None] | None = None  # the live line and its stream


def is_live(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default standard output, is a terminal that can redraw a line."""
    return _is_terminal(stream or sys.stdout) and os.environ.get("TERM") != "dumb"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def width(stream: TextIO | None = None) -> int:
    """The columns that a line may have now: at most 79, and one less than the terminal has.

    Args:
      stream: by default standard output.
    """
    stream, columns = stream or sys.stdout, 0
    if stream is not None and _is_terminal(stream):
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(stream.fileno()).columns
    # A terminal of unknown size reports zero columns.
    return min(_MOST_COLUMNS, (columns or _MOST_COLUMNS + 1) - 1)


def styled(text: str, style: str) -> str:
    """Adds a style of `_STYLES` to a text if standard output shows it and NO_COLOR is not set."""
    if not is_live() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def shown(path: Path) -> str:
    """The shortest form of a path: relative to the working directory if it is inside."""
    with contextlib.suppress(OSError, ValueError):  # it is outside, or there is no such directory
        return str(path.relative_to(Path.cwd()))
    return str(path)


@dataclasses.dataclass(eq=False)
class _Part:
    """One of several runs that report at the same time.

    Attributes:
      name: of the run.
      text: where it is.
    """

    name: str
    text: str = ""


_parts: list[_Part] = []  # all that report now
_part: contextvars.ContextVar[_Part | None] = contextvars.ContextVar("part", default=None)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Within it, in this thread, a run is one of several that share the screen.

    Its lines are not printed, but for warnings and `report`, which begin with its name. It has its
    share of the live line.

    Args:
      name: of the run.
    """
    one = _Part(name)
    _parts.append(one)
    token = _part.set(one)
    try:
        yield
    finally:
        _part.reset(token)
        _parts.remove(one)
        _draw_parts()


def _draw_parts() -> None:
    with _lock:
        shown = [one for one in _parts if one.text]
        size = (width() - 3 * (len(shown) - 1)) // max(len(shown), 1)
        _draw(" | ".join(f"{one.name}  {one.text}"[:size] for one in shown), sys.stdout)


def log(text: str) -> None:
    """Prints lines to standard output, above the live line; a terminal gets them wrapped."""
    if _part.get() is None:
        _print(text, sys.stdout)


def report(text: str) -> None:
    """Shows where a run is: by the live line, or by a line where there is none."""
    if is_live():
        live(text)
    else:
        _print(f"{one.name}  {text}" if (one := _part.get()) else text, sys.stdout)


def log_warning(text: str) -> None:
    """Prints a warning to standard error, above the live line."""
    label = "warning:"
    if one := _part.get():
        label = f"{label} {one.name}:"
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
    """Draws the live line, cut to the width of the terminal; "" removes it.

    Does nothing if standard output is not a terminal.
    """
    if one := _part.get():
        one.text = text
        _draw_parts()
    else:
        _draw(text, sys.stdout)


def _draw(text: str, stream: TextIO | None) -> None:
    global _live
    with _lock:
        if is_live(stream) and (text or _live):
            _live = (text, stream) if text else None
            # The cursor waits at the start of the line, where messages of other programs begin.
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
    """Wraps a line at blanks to the width of the terminal; longer words stay whole."""
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
    """A task that may take long.

    Attributes:
      what: its description, such as "decoding cifar10 train".
      stream: where it is reported.
      detail: its progress; may be set at any time.
      begun: the time of its start on the monotonic clock.
    """

    what: str
    stream: TextIO | None
    detail: str = ""
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def text(self) -> str:
        """One line about the running task."""
        return " ".join(filter(None, (self.what, "...", self.detail)))


_tasks: list[Task] = []  # the innermost last
_reports: TextIO | None = None  # where all tasks are reported, if not where `waiting` says


@contextlib.contextmanager
def tasks_reported_on(stream: TextIO) -> Iterator[None]:
    """Reports all tasks within on a stream, for a program whose standard output is its result."""
    global _reports
    before, _reports = _reports, stream
    try:
        yield
    finally:
        _reports = before


@contextlib.contextmanager
def waiting(what: str, stream: TextIO | None = None) -> Iterator[Task]:
    """Reports a task that takes longer than half a second.

    On a terminal the live line shows it with the seconds so far. In a file there is a line at first
    and one each half minute. A last line gives the time it took. The innermost of nested tasks is
    shown.

    Args:
      what: describes the task, such as "compiling the training step".
      stream: where it is reported, if this is the outermost task and not within
        `tasks_reported_on`; by default standard output.
    """
    if _part.get() is not None:  # nothing but its place in the live line
        live(f"{what} ...")
        yield Task(what, None)
        return
    # Read the stream now: a library may be silenced within by redirecting standard output.
    task = Task(what, _tasks[-1].stream if _tasks else _reports or stream or sys.stdout)
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
    """Reports a task until it is over; runs in a thread."""
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
    """Yields the items, and sets the task's detail to how many of the total were yielded.

    >>> task = Task("decoding", None)
    >>> [task.text() for _ in counted("ab", task, 1000, "images")]
    ['decoding ... 1 of 1,000 images', 'decoding ... 2 of 1,000 images']
    """
    for number, item in enumerate(items, 1):
        task.detail = f"{number:,} of {total:,} {unit}"
        yield item
