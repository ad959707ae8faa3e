"""Runs `python -m cnn` in this process."""

import runpy
import shutil
import signal
import sys

import pytest

from tests.helpers import without_waits


@pytest.fixture
def command(monkeypatch, capfd):
    """Gives exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cnn", *map(str, words)])
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
