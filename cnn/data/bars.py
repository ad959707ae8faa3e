"""The bars of downloads and decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar on stderr, drawn less often where each drawing stays (log files, notebooks)."""
    from tqdm import tqdm

    if sys.stderr is None:  # closed
        return tqdm(iterable, disable=True, **options)
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 2, **options)
