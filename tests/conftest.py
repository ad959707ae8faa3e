"""Fixtures that several rooms share."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import cnn

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def digits(own_home):
    return cnn.load_dataset("digits")


def short_config():
    """A run of two short epochs that takes a few seconds."""
    config = cnn.load_config(REPOSITORY / "configs" / "digits.py")
    config.model.features = (4, 8)
    config.model.hidden_features = 16
    config.num_epochs = 2
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "constant"
    config.batch_size = 96  # 14 steps per epoch, and 93 images left out
    config.num_devices = 2
    return config


@pytest.fixture
def config():
    return short_config()


@pytest.fixture
def batch():
    """A normalized batch of 8 small images, the same in every test."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)
    return {"image": jax.numpy.asarray(image), "label": jax.numpy.arange(8) % 4}


def without_waits(out):
    """What train.py printed, but for what a slow machine reports to take longer."""
    return re.sub(r"(?m)^.*( \.\.\..*|: [\d.]+ s)\n", "", out)


def train_command(*flags):
    return [sys.executable, str(REPOSITORY / "train.py"), *map(str, flags)]


@pytest.fixture
def run_train():
    """Runs train.py as a user does; gives the finished process."""

    def run(*flags, **variables):
        return subprocess.run(
            train_command(*flags),
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            timeout=240,
        )

    return run


ENDLESS = (f"--config={REPOSITORY / 'configs' / 'digits.py'}", "--config.num_epochs=100000")


def start(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def steps_in(run):
    return cnn.CheckpointManager(run / "checkpoints").steps()


@pytest.fixture
def running(tmp_path, digits):
    """A process of train.py that has made some epochs, and its run directory."""
    run = tmp_path / "run"
    with start(train_command(*ENDLESS, "--workdir", run)) as process:
        wait_for(lambda: len(steps_in(run)) > 1, process)
        yield process, run
        process.kill()
