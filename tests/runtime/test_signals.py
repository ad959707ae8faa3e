"""SIGTERM, Ctrl-C and preemption notices: the step ends, it is saved, and the run resumes."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import cnn
from cnn import Interrupted, digest, train_and_evaluate
from cnn.runtime.signals import GracefulShutdown, raise_on_signals
from tests.helpers import (
    ENDLESS,
    REPOSITORY,
    short_config,
    start,
    steps_in,
    train_command,
    wait_for,
    watch_calls,
)

WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_the_running_step(running, signum, code):
    process, run = running
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    blank, notice, line = err.splitlines()
    assert not blank
    assert notice.startswith("stopping: the running step ends")
    saved = max(steps_in(run))
    assert line == (
        f"stopped by {signum.name} at step {saved:,} of 4,400,000, which is saved; the same "
        f"command resumes there"
    )
    assert not (run / "result.json").exists()
    assert "Traceback" not in out + err


def test_a_second_ctrl_c_stops_at_once_even_while_a_step_goes_on(tmp_path, digits):
    """It compiles, or the step, of seconds, has just begun: only the exit can end it."""
    run = tmp_path / "run"
    slow = ("--config.batch_size=1437", "--config.model.features=(512, 512)")
    with start(train_command(*ENDLESS, *slow, "--workdir", run)) as process:
        assert any(line.startswith("compiling the training") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Ctrl-C again stops at once" in process.stderr.readline()
        time.sleep(0.3)  # sooner it would be taken for an echo
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - before < 5
    assert process.returncode == 130
    assert err == ""
    assert cnn.CheckpointManager(run / "checkpoints").read(0)


def test_sigterm_before_the_training(tmp_path, digits):
    with start(train_command(*ENDLESS, "--workdir", tmp_path / "run")) as process:
        assert any(line.startswith("data: digits") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command" in err.splitlines()[-1]


def test_a_closed_terminal_saves_the_running_step(tmp_path, digits):
    """Nothing can be written to it any more, and nothing is."""
    run, (screen, terminal) = tmp_path / "run", pty.openpty()
    take = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", take, *train_command(*ENDLESS, "--workdir", run)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        os.set_blocking(screen, False)

        def has_saved():
            with contextlib.suppress(BlockingIOError):  # who reads it makes room for more
                os.read(screen, 1 << 16)
            return len(steps_in(run)) > 1

        wait_for(has_saved, process)
        before = max(steps_in(run))
        os.close(screen)
        assert process.wait(timeout=60) == 129
    saved = max(steps_in(run))
    assert saved >= before
    assert cnn.CheckpointManager(run / "checkpoints").read(saved)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with GracefulShutdown() as signals:
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
            assert signals.requested() is None
            assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_program_keeps_its_own_handler_of_a_batch_systems_signal():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *args: seen.append(args[0]))
    try:
        with GracefulShutdown() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            assert signals.requested() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_warnings_that_come_again_hurry_nothing(monkeypatch):
    """A batch system sends SIGTERM after its warning, and the kernel SIGXCPU each second."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # as in a notebook
    with GracefulShutdown() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.3)  # sooner the next would be taken for an echo
        for signum in (signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert signals.requested() == signal.SIGUSR2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_training_signals_raise_once():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, *WARNINGS)}
    try:
        raise_on_signals()
        with pytest.raises(Interrupted, match="stopped by SIGHUP; the same command") as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopped.value.signal == signal.SIGHUP
        for signum in before:
            os.kill(os.getpid(), signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulShutdown():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def enter():
        with GracefulShutdown() as signals:
            seen.append(signals.requested())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    state, _ = train_and_evaluate(short_config(), tmp_path_factory.mktemp("whole"))
    return digest(state)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_run_that_was_stopped_ends_in_the_same_bits(config, tmp_path, monkeypatch, whole, calls):
    """Stopped in the first epoch, at its very end, and in the second; three steps in a call."""
    config.runtime.steps_per_execution = 7

    def signal_after(made, state):
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        watch_calls(patch, after=signal_after)
        with pytest.raises(Interrupted, match=f"at step {7 * calls} of 28") as stopped:
            train_and_evaluate(config, tmp_path)
    assert stopped.value.signal == signal.SIGTERM
    assert isinstance(stopped.value, KeyboardInterrupt)
    state, _ = train_and_evaluate(config, tmp_path)
    assert digest(state) == whole
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [14, 28]


def test_a_signal_during_the_last_evaluation(config, tmp_path, monkeypatch, whole):
    """The user saw that the run stops, so it stops before the pictures are drawn."""
    original = cnn.runs.evaluate

    def evaluate(state, *args, **kwargs):
        if int(state.step) == 28:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return original(state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cnn.runs, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="stopped by SIGINT at step 28 of 28"):
            train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "result.json").exists()
    state, _ = train_and_evaluate(config, tmp_path)
    assert digest(state) == whole


def test_a_signal_twice_in_a_moment_is_one(capfd):
    with GracefulShutdown() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert signals.requested() == signal.SIGTERM
    assert capfd.readouterr().err.count("stopping") == 1


def test_in_a_notebook_a_second_ctrl_c_is_a_keyboard_interrupt(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with GracefulShutdown() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        assert signals.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_preemption_notice_to_jax_is_followed(tmp_path):
    """SIGTERM where jax.distributed runs: its preemption service takes it, and names the step."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    run = tmp_path / "run"
    program = f"""
import sys
import jax
jax.distributed.initialize({address!r}, num_processes=1, process_id=0)
sys.path.insert(0, {str(REPOSITORY)!r})
import cnn
config = cnn.load_config({str(REPOSITORY / "configs" / "digits.py")!r})
config.num_epochs = 100_000
try:
    cnn.train_and_evaluate(config, {str(run)!r})
except cnn.Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(128 + stop.signal)
"""
    with start([sys.executable, "-c", program]) as process:
        wait_for(lambda: len(steps_in(run)) > 1, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert f"stopped by SIGTERM at step {max(steps_in(run)):,} of 4,400,000, which is saved" in err
