"""Signals and preemption notices, as a request to stop that a training loop polls."""

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
# Some senders signal the process and then its group: a second signal within this time is the same.
_ECHO_SECONDS = 0.2
_REQUESTS = (signal.SIGINT, signal.SIGTERM)
# A closed terminal, the warnings of batch systems before they kill (Slurm, Grid Engine, LSF), and
# the limit on processor time, of which the kernel reminds the process every second.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class GracefulShutdown:
    """Within it, a signal is a request to stop, which `requested` returns.

    SIGINT (Ctrl-C) and SIGTERM are such signals. So are the warnings SIGHUP (a closed terminal),
    SIGUSR1, SIGUSR2 (batch systems) and SIGXCPU, unless the program handles them itself.

    After the first signal, another Ctrl-C ends the process at once, as does a SIGTERM after a
    Ctrl-C or a SIGTERM. In a notebook, whose process is not only the run's, it raises
    KeyboardInterrupt instead. A repeated warning does neither.

    A signal that was ignored before, as SIGINT is under `nohup ... &` and SIGHUP under `nohup`,
    stays ignored. Outside the main thread, in which alone Python handles signals, nothing changes,
    and `requested` returns what an object in the main thread has received.
    Where `jax.distributed` runs, JAX's preemption service handles SIGTERM, and makes all processes
    stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._polls = 0
        self._ends_process = hasattr(sys.modules["__main__"], "__file__")
        # getattr: JAX declares its options at run time, unseen by type checkers.
        option = "jax_enable_preemption_service"
        self._service = jax.distributed.is_initialized() and getattr(jax.config, option)

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is not threading.main_thread():
            return self
        _in_main_thread.append(self)
        requests = [signum for signum in _REQUESTS if signum == signal.SIGINT or not self._service]
        for signum in (*requests, *_WARNINGS):
            handler = signal.getsignal(signum)
            if handler in (signal.SIG_IGN, None):  # None: the handler is not one of Python's
                continue
            if signum in requests or handler in (signal.SIG_DFL, _interrupt):
                self._before[signum] = handler
                signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self in _in_main_thread:
            _in_main_thread.remove(self)
        for signum, handler in self._before.items():
            ends = handler is _interrupt and isinstance(error, Interrupted)
            signal.signal(signum, signal.SIG_IGN if ends else handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the main thread; JAX lets it run while it compiles and while it waits."""
        if self._received is None:
            self._received, self._when = signum, time.monotonic()
            # Standard error may be gone; if it was closed from the start, 2 may be another file.
            with contextlib.suppress(OSError):
                if sys.__stderr__ is not None:
                    os.write(2, _NOTICE)
        elif time.monotonic() - self._when > _ECHO_SECONDS and (
            signum == signal.SIGINT or (signum in _REQUESTS and self._received in _REQUESTS)
        ):
            if self._ends_process:
                os._exit(128 + signum)
            raise KeyboardInterrupt

    def request(self) -> None:
        """Requests the runs of other threads to stop, as SIGTERM does."""
        self._received = self._received or signal.SIGTERM

    def requested(self) -> int | None:
        """The signal that requests the run to stop; None if there is none.

        Where there are several processes, all must call this after the same steps.
        """
        if self._received is None and self._service:
            # JAX names the poll at which all stop: one that no process has reached yet.
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                return signal.SIGTERM
        if threading.current_thread() is not threading.main_thread():
            return next((one._received for one in _in_main_thread), None)
        return self._received


_in_main_thread: list[GracefulShutdown] = []  # the outermost first


def raise_on_signals() -> None:
    """Makes SIGTERM and the warnings raise `Interrupted` outside of `GracefulShutdown`.

    Signals that are ignored stay ignored. After the first one all are ignored, so that the process,
    which then ends, prints one message.
    """
    for signum in (signal.SIGTERM, *_WARNINGS):
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, *_WARNINGS):
        if signal.getsignal(other) is _interrupt:
            signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(signum).name
    raise Interrupted(f"stopped by {name}; the same command resumes the run", signum)
