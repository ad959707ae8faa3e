"""How a command line ends: exit codes, one line on standard error, a parser without guesses."""

import asyncio
import gc
import sys

import pytest
from jax.errors import JaxRuntimeError

from cnn.errors import Interrupted, UserError
from cnn.runtime import cli


@pytest.fixture
def ending(monkeypatch, capsys):
    """Runs a program that raises an exception; gives exit code and standard error."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored

    def run(error, **options):
        def main(argv):
            assert argv == ["--flag"]
            raise error

        monkeypatch.setattr(sys, "argv", ["program", "--flag"])
        with pytest.raises(SystemExit) as stop:
            cli.run(main, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return stop.value.code, err

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("batch_size=0 must be 1 or more"), 2, "error: batch_size=0 must be 1 or more"),
        (OSError("no\nspace"), 2, r"error: no\nspace"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating"), 2,
            "error: not enough memory (RESOURCE_EXHAUSTED: out of memory); choose a smaller "
            "batch_size, eval_batch_size or model",
        ),
        (Interrupted("stopped after step 3", 15), 143, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was kept"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_an_exit_code(ending, error, code, line):
    assert ending(error, interrupted="nothing was kept") == (code, f"{line}\n")


@pytest.mark.parametrize("bug", [ValueError("a bug"), JaxRuntimeError("INTERNAL: a bug")])
def test_a_bug_keeps_its_traceback(ending, bug):
    with pytest.raises(type(bug), match="a bug"):
        ending(bug)


def test_pending_writes_of_a_failed_save_are_hidden(ending, capsys):
    ending(UserError("the disk is full"))

    class Pending:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    Pending("Event loop is closed")
    assert capsys.readouterr().err == ""
    Pending("another")
    assert "RuntimeError: another" in capsys.readouterr().err


def test_a_parser_raises_and_takes_no_abbreviation():
    parser = cli.Parser("python train.py", "Trains.")
    parser.add_argument("--rounds", type=int)
    with pytest.raises(UserError, match=r"--round=3; python train\.py --help lists the flags"):
        parser.parse_args(["--round=3"])


def test_writes_that_fail_together_are_one_error(monkeypatch, capsys, caplog):
    """Orbax awaits the first; asyncio would log the other when it is collected."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored
    monkeypatch.setattr(sys, "argv", ["program"])

    async def fail():
        raise OSError("No space left on device")

    async def write():
        tasks = [asyncio.ensure_future(fail()) for _ in range(2)]
        await asyncio.sleep(0)
        await tasks[0]

    def main(argv):
        try:
            asyncio.run(write())
        finally:
            gc.collect()

    with pytest.raises(SystemExit):
        cli.run(main)
    gc.collect()
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert caplog.records == []
