"""Keeps what JAX has compiled, so that the next start need not compile it again."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from cnn.errors import one_line
from cnn.runtime.disk import cache_directory

_LIMIT = 256 << 20  # bytes; a run leaves a few hundred thousand on a CPU
_TROUBLE = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"
_DIRECTORY, _MIN_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
_QUIET_SINCE = (0, 10, 2)  # before, XLA prints an error per entry it loads on CPUs with AVX-512


@contextlib.contextmanager
def compilation_cache(wanted: bool) -> Iterator[None]:
    """Within it, JAX keeps what it compiles in the user's cache folder, and looks there first.

    What is loaded is what was compiled: the results are the same bits. JAX tells entries of
    other programs, versions and kinds of processor apart. Whoever has set JAX's own
    `jax_compilation_cache_dir` keeps that cache; afterwards JAX's settings are as before.

    Never fails: a folder that cannot be written costs a line on stderr, an entry that cannot be
    read (a process was killed while writing it) one more compilation, which replaces it.

    Args:
      wanted: false leaves JAX as it is.
    """
    chosen = getattr(jax.config, _DIRECTORY)
    if chosen is not None:
        with _troubles_settled(Path(chosen), own=False):
            yield
        return
    if not wanted or jax.__version_info__ < _QUIET_SINCE:
        yield
        return
    directory = None
    try:
        directory = cache_directory() / "jax"
        os.fspath(directory).encode()  # XLA takes no other path
        directory.mkdir(parents=True, exist_ok=True)
        prune(directory, _LIMIT)
    except OSError as error:
        _tell(directory or error.filename, error.strerror)
        yield
        return
    except UnicodeEncodeError:
        _tell(directory, "its path is not UTF-8")
        yield
        return
    # All of them: what takes a hundredth of a second to compile is loaded faster still.
    settings = {_DIRECTORY: str(directory), _MIN_SECONDS: 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        with _troubles_settled(directory, own=True):
            yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX looks at its settings once


@contextlib.contextmanager
def _troubles_settled(directory: Path, *, own: bool) -> Iterator[None]:
    """Acts on what JAX warns of: entries of ours that it cannot read are deleted, else it says so.

    JAX itself compiles what it cannot read, but does not write over the damaged file.
    """
    shown, told = warnings.showwarning, []

    def show(message: Warning | str, *where: Any) -> None:
        if (trouble := re.match(_TROUBLE, str(message))) is None:
            shown(message, *where)
        elif own and trouble[1] == "reading":
            for entry in directory.glob(f"{trouble[2]}-*"):
                with contextlib.suppress(OSError):
                    entry.unlink()
        elif not told:
            told.append(True)
            _tell(directory, trouble[3], "XDG_CACHE_HOME" if own else "JAX_COMPILATION_CACHE_DIR")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_TROUBLE)
        warnings.showwarning = show
        yield


def _tell(directory: Any, reason: str | None, variable: str = "XDG_CACHE_HOME") -> None:
    line = (
        f"cnn: cannot keep compiled functions in {directory} ({reason}); every start will "
        f"compile them anew ({variable} moves the cache)"
    )
    print(one_line(line), file=sys.stderr)


def prune(directory: Path, limit: int) -> None:
    """Deletes the oldest files of a folder until it holds no more than `limit` bytes.

    JAX's own `jax_compilation_cache_max_size` needs another package, and stores nothing more
    once a process was killed between the two files of an entry (jax issue 39880).
    """
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            if path.is_file():
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
    for _, path, size in sorted(found, reverse=True):  # the newest first
        limit -= size
        if limit < 0:
            path.unlink(missing_ok=True)
