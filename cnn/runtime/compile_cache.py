"""A cache of compiled programs on disk, so that the next start need not compile them again."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from cnn.errors import one_line
from cnn.runtime.disk import cache_directory
from cnn.runtime.screen import log_warning

_LIMIT = 256 << 20  # bytes; a run leaves a few hundred thousand on a CPU
_WARNING = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"
_DIRECTORY, _MIN_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
_OWN_VARIABLE, _JAX_VARIABLE = "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"
_is_active = False  # in this process, whose settings of JAX it changes
_QUIET_SINCE = (0, 10, 2)  # before, XLA prints an error per entry it loads on CPUs with AVX-512


@contextlib.contextmanager
def compilation_cache(enabled: bool) -> Iterator[None]:
    """Within it, JAX keeps compiled programs in the user's cache folder, and loads them from there.

    A loaded program is the one that was compiled, so results have the same bits. JAX separates the
    entries of other programs, versions and kinds of processor. If `jax_compilation_cache_dir` is
    set, that folder is used instead. Afterwards JAX's settings are as before.

    Never raises: a folder that cannot be written costs one warning. An entry that cannot be read,
    because a process was killed or the disk was full, costs one compilation, which replaces it.
    Within another one it does nothing: the outer one holds in all threads.

    Args:
      enabled: false leaves JAX's settings as they are.
    """
    global _is_active
    if _is_active:
        yield
        return
    _is_active = True
    try:
        with _cache(enabled):
            yield
    finally:
        _is_active = False


@contextlib.contextmanager
def _cache(enabled: bool) -> Iterator[None]:
    """`compilation_cache`, which is not within another one."""
    if (chosen := getattr(jax.config, _DIRECTORY)) is not None:
        with _repair_on_warning(Path(chosen), _JAX_VARIABLE):
            yield
        return
    is_possible = enabled and jax.__version_info__ >= _QUIET_SINCE
    if (directory := _own_directory() if is_possible else None) is None:
        yield
        return
    # Every program: one that compiles in a hundredth of a second is loaded faster still.
    settings = {_DIRECTORY: str(directory), _MIN_SECONDS: 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        with _repair_on_warning(directory, _OWN_VARIABLE):
            yield
    finally:
        _configure(before)


def _own_directory() -> Path | None:
    """The folder of this program's cache; None, after a warning, if it cannot be written."""
    directory = None
    try:
        directory = cache_directory() / "jax"
        os.fspath(directory).encode()  # XLA accepts no other path
        directory.mkdir(parents=True, exist_ok=True)
        prune(directory, _LIMIT)
    except UnicodeEncodeError:
        _warn(directory, "its path is not UTF-8", _OWN_VARIABLE)
        return None
    except OSError as error:
        _warn(directory or error.filename, error.strerror, _OWN_VARIABLE)
        return None
    return directory


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX reads its settings only once


@contextlib.contextmanager
def _repair_on_warning(directory: Path, variable: str) -> Iterator[None]:
    """Turns JAX's warnings about its cache into actions.

    An unreadable entry of our own is deleted: JAX compiles it again but would not replace the file.
    Any other trouble is reported once. Other warnings are shown as before.
    """
    show_other, has_warned = warnings.showwarning, False

    def show(message: Warning | str, *where: Any) -> None:
        nonlocal has_warned
        if (trouble := re.match(_WARNING, str(message))) is None:
            show_other(message, *where)
        elif variable == _OWN_VARIABLE and trouble[1] == "reading":
            for entry in directory.glob(f"{trouble[2]}-*"):
                with contextlib.suppress(OSError):
                    entry.unlink()
        elif not has_warned:
            has_warned = True
            _warn(directory, trouble[3], variable)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_WARNING)
        warnings.showwarning = show
        yield


def _warn(directory: Any, reason: str | None, variable: str) -> None:
    text = (
        f"compiled programs cannot be cached in {directory} ({reason}); every start compiles them "
        f"again ({variable} moves the cache)"
    )
    log_warning(one_line(text))


def prune(directory: Path, limit: int) -> None:
    """Deletes the oldest files of a folder until it holds at most `limit` bytes.

    JAX's own `jax_compilation_cache_max_size` needs another package, and stores nothing more once a
    process was killed between writing the two files of an entry (jax issue 39880).
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
