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

    A signal that was ignored before, as SIGINT is under `nohup ... &`, stays ignored. In a thread
    other than the main one, which Python lets handle no signals, nothing changes. Where
    `jax.distributed` runs, SIGTERM belongs to JAX's preemption service, which has all processes
    stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        wanted = [signal.SIGINT]
        if not jax.distributed.is_initialized():
            wanted.append(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for signum in wanted:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # None: not Python's
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        for one in self._before:
            signal.signal(one, signal.SIG_DFL)  # acts at once, even while a compiler runs
        os.write(2, _NOTICE)  # print() may be what was interrupted

    def received(self, step: int) -> int | None:
        """The signal that wants the run to stop after this step; None if there is none.

        Args:
          step: steps done; where there are several processes, each asks after the same ones.
        """
        if self._received is None and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._received


def raise_on_sigterm() -> None:
    """Makes SIGTERM an `Interrupted` wherever no `StopSignals` waits for it, as Ctrl-C is one."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; the same command continues the run", signum)

    signal.signal(signal.SIGTERM, stop)
