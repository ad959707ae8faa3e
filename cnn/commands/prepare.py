"""What the commands that take a config have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cnn.experiment import Experiment, create_experiment
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.devices import select_devices
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.screen import waiting


@contextlib.contextmanager
def prepared(config: Any) -> Iterator[tuple[Experiment, int]]:
    """The experiment of a checked config and the number of devices, with the settings of a run."""
    runtime = config.runtime
    with pinned_settings():
        with waiting("starting the devices"):
            devices = select_devices(
                runtime.platform, runtime.num_devices, deterministic=runtime.deterministic
            )
        experiment = create_experiment(config, devices)
        with compilation_cache(runtime.compilation_cache):
            yield experiment, len(devices)
