"""Runs `python -m cnn` in this process."""

import runpy
import shutil
import signal
import sys

import pytest

from tests.helpers import without_waits


@pytest.fixture
def command(digits, monkeypatch, capfd, tmp_path):
    """Runs a command in an empty folder; gives exit code, standard output and standard error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cnn", *map(str, words)])
        monkeypatch.delitem(sys.modules, "cnn.__main__", raising=False)  # the doctests import it
        capfd.readouterr()
        code = 0
        try:
            runpy.run_module("cnn", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code or 0, out, without_waits(err)

    yield run
    for signum, handler in handlers.items():
        if signal.getsignal(signum) is not handler:
            signal.signal(signum, handler)


@pytest.fixture
def own_copy(trained_run, tmp_path):
    """A copy of the trained run, to write into."""
    return shutil.copytree(trained_run, tmp_path / "digits")


SMALL = (
    "digits", "--config.model.features=(4, 8)", "--config.model.hidden_features", "16",
    "--config.batch_size=96", "--config.runtime.num_devices=2",
)  # fmt: skip


@pytest.fixture
def small():
    """A CONFIG, and flags that make its network small."""
    return SMALL
