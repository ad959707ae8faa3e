"""What the commands that take a config have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cnn.experiment import Experiment, create_experiment, devices_of
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.jax_settings import pinned_settings


@contextlib.contextmanager
def prepared(config: Any) -> Iterator[Experiment]:
    """The experiment of a checked config, with the settings of a run."""
    with pinned_settings():
        experiment = create_experiment(config, devices_of(config))
        with compilation_cache(config.runtime.compilation_cache):
            yield experiment
