"""Fixtures that several rooms share."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import cnn
from tests.helpers import (
    ENDLESS,
    REPOSITORY,
    short_config,
    start,
    steps_in,
    train_command,
    wait_for,
    without_waits,
)

GIVEN_DATA_DIR = os.environ.get("TFDS_DATA_DIR")  # before any fixture replaces it


@pytest.fixture
def real_cifar10():
    """The TFDS data directory that holds the real CIFAR-10, if this machine has one."""
    root = Path(GIVEN_DATA_DIR or Path(__file__).parents[2] / "shared" / "tfds")
    if not (root / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10 here")
    return root


@pytest.fixture(scope="session")
def digits(own_home):
    return cnn.load_dataset("digits")


@pytest.fixture(scope="session")
def trained_run(digits, tmp_path_factory):
    """The directory of a finished run on the digits; not to be written into."""
    path = tmp_path_factory.mktemp("trained") / "run"
    cnn.train_and_evaluate(short_config(), path)
    return path


@pytest.fixture
def config():
    return short_config()


@pytest.fixture
def batch():
    """A normalized batch of 8 small images, the same in every test."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)
    return {"image": jax.numpy.asarray(image), "label": jax.numpy.arange(8) % 4}


@pytest.fixture
def in_process(monkeypatch, capfd):
    """Runs train.py in this process; gives exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, without_waits(out), err

    yield run
    for signum, handler in handlers.items():
        if signal.getsignal(signum) is not handler:
            signal.signal(signum, handler)


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


@pytest.fixture
def running(tmp_path, digits):
    """A process of train.py that has made some epochs, and its run directory."""
    run = tmp_path / "run"
    with start(train_command(*ENDLESS, "--workdir", run)) as process:
        wait_for(lambda: len(steps_in(run)) > 1, process)
        yield process, run
        process.kill()
