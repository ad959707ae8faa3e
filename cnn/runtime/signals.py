"""Signals and preemption notices, as a wish to stop that a loop can ask for."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from cnn.errors import Interrupted

_NOTICE = b"\nstopping: the running step ends and is saved; Ctrl-C again stops at once\n"
# What sends a signal to a process may send it to the process's group too, in the same moment.
_ECHO_SECONDS = 0.2
# A closed terminal, warnings of batch systems before they kill (Slurm, Grid Engine, LSF), and the
# limit on processor time, of which the kernel reminds each second.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class GracefulShutdown:
    """Within it SIGINT (Ctrl-C), SIGTERM and what warns of an end are noted.

    The latter are SIGHUP (a closed terminal), SIGUSR1, SIGUSR2 (batch systems) and SIGXCPU, where
    the program has no handlers of its own for them.

    After the first signal a Ctrl-C, or a SIGTERM that follows either of these two, ends the process
    at once: a thread listens, as Python's own handlers wait while the main thread compiles, say. In
    a notebook, where the process is not the run's alone, that is a KeyboardInterrupt. Warnings may
    come again and again, and hurry nothing.

    A signal that was ignored before, as SIGINT is under `nohup ... &` and SIGHUP under `nohup`,
    stays ignored. In a thread other than the main one, which Python lets handle no signals, nothing
    changes. Where `jax.distributed` runs, SIGTERM belongs to JAX's preemption service, which has
    all processes stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._asked = 0
        self._ends_process = hasattr(sys.modules["__main__"], "__file__")
        # getattr: jax declares its options at run time, unseen by type checkers.
        option = "jax_enable_preemption_service"
        self._service = jax.distributed.is_initialized() and getattr(jax.config, option)

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is not threading.main_thread():
            return self
        wanted = [signal.SIGINT] if self._service else [signal.SIGINT, signal.SIGTERM]
        before = {signum: signal.getsignal(signum) for signum in (*wanted, *_WARNINGS)}
        self._before = {
            signum: handler
            for signum, handler in before.items()
            # None: not a handler of Python's.
            if handler not in (signal.SIG_IGN, None)
            and (signum in wanted or handler in (signal.SIG_DFL, _interrupt))
        }
        read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        # The thread listens before the first handler is silenced, and until the last one is back.
        threading.Thread(target=self._listen, args=(read_fd,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for signum in self._before:
            signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, handler in self._before.items():
            ends = handler is _interrupt and isinstance(error, Interrupted)
            signal.signal(signum, signal.SIG_IGN if ends else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_fd)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread, when it comes to it."""
        if self._hurries(signum):
            raise KeyboardInterrupt

    def _hurries(self, signum: int) -> bool:
        """Whether a signal, after the one before it, means that the process shall end at once."""
        if self._received is None or time.monotonic() - self._when <= _ECHO_SECONDS:
            return False
        by_hand = (signal.SIGINT, signal.SIGTERM)
        return signum == signal.SIGINT or (signum in by_hand and self._received in by_hand)

    def _listen(self, read_fd: int) -> None:
        """In a thread: reads the numbers of signals as they come, until nobody can send more."""
        with open(read_fd, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if number[0] not in self._before:
                    continue
                if self._hurries(number[0]) and self._ends_process:
                    os._exit(128 + number[0])
                if self._received is None:
                    self._received, self._when = number[0], time.monotonic()
                    # Nobody may look any more; or standard error was closed from the beginning,
                    # and its number may be that of another file.
                    with contextlib.suppress(OSError):
                        if sys.__stderr__ is not None:
                            os.write(2, _NOTICE)

    def requested(self) -> int | None:
        """The signal that wants the run to stop now; None if there is none.

        Where there are several processes, each asks after the same steps.
        """
        if self._received is None and self._service:
            # JAX names a number for all to stop at: one more than any has asked for.
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                return signal.SIGTERM
        return self._received


def raise_on_signals() -> None:
    """Makes signals an `Interrupted` wherever no `GracefulShutdown` waits for them, as Ctrl-C is one.

    These are SIGTERM and those that warn of an end; what is ignored stays so. After the first one
    they are ignored, so that the process, which ends now, says so once.
    """
    for signum in (signal.SIGTERM, *_WARNINGS):
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _ignore_further()
    name = signal.Signals(signum).name
    raise Interrupted(f"stopped by {name}; the same command continues the run", signum)


def _ignore_further() -> None:
    for signum in (signal.SIGTERM, *_WARNINGS):
        if signal.getsignal(signum) is _interrupt:
            signal.signal(signum, signal.SIG_IGN)
