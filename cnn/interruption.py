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


class StopSignals:
    """Within it SIGINT (Ctrl-C) and SIGTERM are noted; a second one ends the process at once.

    At once, as a thread listens: Python's own handlers wait while the main thread compiles, say. In
    a notebook, where the process is not the run's alone, the second one is a KeyboardInterrupt.

    A signal that was ignored before, as SIGINT is under `nohup ... &`, stays ignored. In a thread
    other than the main one, which Python lets handle no signals, nothing changes. Where
    `jax.distributed` runs, SIGTERM belongs to JAX's preemption service, which has all processes
    stop after the same step.
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

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        wanted = [signal.SIGINT] if self._service else [signal.SIGINT, signal.SIGTERM]
        before = {signum: signal.getsignal(signum) for signum in wanted}
        # None: not a handler of Python's.
        self._before = {
            signum: handler
            for signum, handler in before.items()
            if handler not in (signal.SIG_IGN, None)
        }
        ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        # The thread listens before the first handler is silenced, and until the last one is back.
        threading.Thread(target=self._listen, args=(ears,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
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
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._mouth)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread, when it comes to it."""
        if self._is_second():
            raise KeyboardInterrupt

    def _is_second(self) -> bool:
        return self._received is not None and time.monotonic() - self._when > _ECHO_SECONDS

    def _listen(self, ears: int) -> None:
        """In a thread: reads the numbers of signals as they come, until nobody can send more."""
        with open(ears, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if number[0] not in self._before:
                    continue
                if self._is_second() and self._ends_process:
                    os._exit(128 + number[0])
                if self._received is None:
                    self._received, self._when = number[0], time.monotonic()
                    with contextlib.suppress(OSError):  # nobody may look any more
                        os.write(2, _NOTICE)

    def received(self) -> int | None:
        """The signal that wants the run to stop now; None if there is none.

        Where there are several processes, each asks after the same steps.
        """
        if self._received is None and self._service:
            # JAX names a number for all to stop at: one more than any has asked for.
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                return signal.SIGTERM
        return self._received


def raise_on_sigterm() -> None:
    """Makes SIGTERM an `Interrupted` wherever no `StopSignals` waits for it, as Ctrl-C is one."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; the same command continues the run", signum)

    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, stop)
