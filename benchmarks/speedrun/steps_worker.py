"""Our training steps, on command, in a process of their own.

    python -m benchmarks.speedrun.steps_worker CONFIG.json IMAGES.npz

{"do": "sample", "steps": n} trains n steps as train.py does, on the batches of one call.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax

from benchmarks.arrays import read_arrays
from benchmarks.dialogue import answering, commands
from cnn import compile_train_steps, load_config, select_devices
from cnn.config import check_config
from cnn.experiment import create_experiment
from cnn.runtime.jax_settings import pinned_settings


def main(config_file: str, archive: str) -> None:
    """Serves commands until there are no more."""
    answer = answering()
    config: Any = check_config(load_config(config_file))
    devices = select_devices(config.runtime.platform, deterministic=config.runtime.deterministic)
    experiment = create_experiment(config, devices, dataset=read_arrays(archive))
    state = experiment.initial_state()
    train = compile_train_steps(state, experiment.pipeline)
    batches, most = next(experiment.pipeline.epoch(0))
    jax.block_until_ready(batches)
    answer({"ready": True})
    for command in commands():
        begun = time.perf_counter()
        left = command["steps"]
        while left:
            count = min(left, most)
            state, _ = train(state, batches, count)
            left -= count
        jax.block_until_ready(state)
        answer({"seconds": time.perf_counter() - begun})


if __name__ == "__main__":
    with pinned_settings():
        main(*sys.argv[1:])
