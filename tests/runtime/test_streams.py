"""Standard output and error that are closed, full or gone end nothing."""

import errno
import io
import subprocess
import sys

import pytest

from cnn.runtime.screen import log, log_warning
from tests.helpers import REPOSITORY, train_command

FULL = "warning: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    ("redirected", "code", "err"),
    [
        ("--help >/dev/full", 0, FULL),
        ("--help >&-", 0, ""),
        ("--help 2>&- >/dev/full", 0, ""),
        ("--bogus 2>/dev/full", 2, ""),
        ("--bogus <&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_of_train_py(redirected, code, err):
    command = f"exec {sys.executable} {REPOSITORY / 'train.py'} {redirected}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, err)


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os, sys\nfrom cnn.runtime.streams import lenient_streams\n"
        f"with lenient_streams(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    os.write(2, b'from a library')\n"
        "    print('from the program')\n"
        "    sys.exit(file.fileno())\n"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code],
        cwd=REPOSITORY, timeout=100,
    )  # fmt: skip
    assert done.returncode > 2
    assert (tmp_path / "file").read_text() == ""


def test_a_reader_that_leaves_costs_no_result(tmp_path, digits):
    command = train_command(
        f"--config={REPOSITORY / 'configs' / 'digits.py'}", "--config.num_epochs=1",
        "--config.model.features=(4,)", "--workdir", tmp_path / "run",
    )  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=100) == 0
        err = process.stderr.read().decode()
    assert err.endswith("warning: standard output cannot be written (Broken pipe)\n")
    assert (tmp_path / "run" / "result.json").exists()


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [Full(), io.StringIO(), None], ids=["full", "closed", "none"])
def test_what_a_run_says_never_fails(monkeypatch, stream):
    if stream is not None and not isinstance(stream, Full):
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    log("a line")
    log_warning("a line")


def test_a_result_that_cannot_be_written_is_an_error():
    """What `python -m cnn` prints is its result; a reader that has gone wants no more of it."""
    program = f"{sys.executable} -m cnn"
    done = subprocess.run(
        ["sh", "-c", f"{program} >/dev/full; echo $?; {program} | head -c 1 >/dev/null"],
        capture_output=True, text=True, timeout=100, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout == "2\n"
    reason = "No space left on device"
    assert done.stderr == f"error: standard output could not be written ({reason})\n"
