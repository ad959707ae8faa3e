"""Signals and preemption notices, as a wish to stop that a loop can ask for."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from cnn.errors import Interrupted

_NOTICE = b"\nstopping: the running step ends and is saved; Ctrl-C again stops at once\n"


class StopSignals:
    """Within it SIGINT (Ctrl-C) and SIGTERM are noted; a second one ends the process at once.

    At once, as a thread listens: Python's own handlers wait while the main thread compiles, say.

    A signal that was ignored before, as SIGINT is under `nohup ... &`, stays ignored. In a thread
    other than the main one, which Python lets handle no signals, nothing changes. Where
    `jax.distributed` runs, SIGTERM belongs to JAX's preemption service, which has all processes
    stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._asked = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        wanted = [signal.SIGINT]
        if not jax.distributed.is_initialized():
            wanted.append(signal.SIGTERM)
        ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        for signum in wanted:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # None: not Python's
                self._before[signum] = signal.signal(signum, lambda signum, frame: None)
        self._wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ears,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._mouth)

    def _listen(self, ears: int) -> None:
        """In a thread: reads the numbers of signals as they come, until nobody can send more."""
        with open(ears, "rb", buffering=0) as stream:
            while number := stream.read(1):
                if number[0] not in self._before:
                    continue
                if self._received is not None:
                    os._exit(128 + number[0])
                self._received = number[0]
                os.write(2, _NOTICE)

    def received(self) -> int | None:
        """The signal that wants the run to stop now; None if there is none.

        Where there are several processes, each asks after the same steps.
        """
        # JAX names a number for all to stop at: one more than any has asked for.
        self._asked += 1
        if self._received is None and multihost_utils.reached_preemption_sync_point(self._asked):
            return signal.SIGTERM
        return self._received


def raise_on_sigterm() -> None:
    """Makes SIGTERM an `Interrupted` wherever no `StopSignals` waits for it, as Ctrl-C is one."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; the same command continues the run", signum)

    signal.signal(signal.SIGTERM, stop)
