"""A function on many items, on all cores that this process may use."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from cnn.runtime.devices import usable_cores

_T = TypeVar("_T")
_R = TypeVar("_R")
_AHEAD = 16  # items of a part, for each core


def map_in_parts(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[list[_R]]:
    """Applies a function to items, in threads.

    It suits functions that release the interpreter lock. Ctrl-C and SIGTERM take effect at once,
    also while a call waits for a disk that does not answer.

    Yields:
      The results in the order of the items, some at a time. Nothing runs between two parts, so that
      what is ahead of the caller is bounded.

    >>> sum(map_in_parts(abs, [1, -2, 3]), [])
    [1, 2, 3]
    """
    remaining = iter(items)
    cores = usable_cores()
    while part := list(itertools.islice(remaining, _AHEAD * cores)):
        yield _map(function, part, cores)


def _map(function: Callable[[_T], _R], items: Sequence[_T], cores: int) -> list[_R]:
    """The results for a few items, or the exception of one of them."""
    waiting = collections.deque(enumerate(items))
    results: dict[int, _R] = {}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                try:
                    index, item = waiting.popleft()
                except IndexError:
                    return
                results[index] = function(item)
        except BaseException as error:
            waiting.clear()
            errors.append(error)

    # An executor of concurrent.futures would wait for its threads when the process ends.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(cores, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        waiting.clear()  # after a signal, what was not begun is not done
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
