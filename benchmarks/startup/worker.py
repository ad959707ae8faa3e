"""One start of `train.py`, timed from within, for `benchmarks.startup`.

It is given the monotonic clock at its command and the flags of `train.py`. It runs the same
functions, and ends after the first call of the training step with a line of JSON: seconds by part.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PARTS = (
    "Python and imports",
    "devices",
    "data",
    "initial state",
    "first checkpoint",
    "order, first batches",
    "training step",
    "first steps",
)


def main() -> None:
    """Runs `train.py` up to its first steps; does not return."""
    begun = float(sys.argv[1])
    marks = [begun]

    def mark() -> None:
        marks.append(time.monotonic())

    gc.disable()  # as train.py does it
    import train

    gc.freeze()
    gc.enable()
    mark()

    import jax

    import cnn.execution
    import cnn.experiment
    import cnn.runs
    import cnn.training

    def marked(place: Any, name: str, before: Callable[[], None] | None = None) -> None:
        call = getattr(place, name)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before()
            result = call(*args, **kwargs)
            mark()
            if before is not None:
                jax.block_until_ready(result)
                mark()
                report()
            return result

        setattr(place, name, timed)

    def report() -> None:
        seconds = [end - start for start, end in itertools.pairwise(marks)]
        found = {"parts": dict(zip(PARTS, seconds, strict=True)), "cpu": time.process_time()}
        os.write(2, f"\n{json.dumps(found)}\n".encode())
        os._exit(0)  # without the rest of the run

    marked(cnn.training, "devices_of")
    marked(cnn.training, "create_experiment")
    marked(cnn.experiment.Experiment, "initial_state")
    marked(cnn.runs.Run, "begin")
    marked(cnn.execution.TrainSteps, "__call__", mark)
    train.main(sys.argv[2:])


if __name__ == "__main__":
    main()
