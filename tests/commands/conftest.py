"""python -m cnn as a person uses it, in this process."""

import runpy
import signal
import sys

import pytest


@pytest.fixture
def command(digits, monkeypatch, capfd, tmp_path):
    """Runs python -m cnn in an empty folder; gives exit code, standard output and error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
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
        return code, *capfd.readouterr()

    yield run
    for signum, handler in handlers.items():
        if signal.getsignal(signum) is not handler:
            signal.signal(signum, handler)


SMALL = (
    "digits", "--config.model.features=(4, 8)", "--config.model.hidden_features", "16",
    "--config.batch_size=96", "--config.runtime.num_devices=2",
)  # fmt: skip


@pytest.fixture
def small():
    """A CONFIG, and flags that make its network small."""
    return SMALL
