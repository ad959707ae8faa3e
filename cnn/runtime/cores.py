"""A function on many items, on all cores that this process may use."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from cnn.runtime.devices import usable_cores

_T = TypeVar("_T")
_R = TypeVar("_R")
_AHEAD = 16  # items of a part, for each core


def map_in_parts(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[list[_R]]:
    """Applies a function to items, in threads.

    It suits functions that release the interpreter lock.

    Yields:
      The results in the order of the items, some at a time. Nothing runs between two parts, so that
      what is ahead of the caller is bounded, and Ctrl-C takes effect soon.

    >>> sum(map_in_parts(abs, [1, -2, 3]), [])
    [1, 2, 3]
    """
    remaining = iter(items)
    cores = usable_cores()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        while part := list(itertools.islice(remaining, _AHEAD * cores)):
            yield list(pool.map(function, part))
