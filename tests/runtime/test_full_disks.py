"""Disks that are full, read-only or gone during a run; the same command resumes it afterwards."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

import cnn
from tests.helpers import REPOSITORY, train_command, watch_calls

FLAGS = (
    f"--config={REPOSITORY / 'configs' / 'digits.py'}",
    "--config.num_epochs=2",
    "--config.runtime.checkpoint_every_steps=4",
)


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return sys.platform == "linux" and shutil.which("unshare") is not None and not (
        subprocess.run(command, capture_output=True).returncode
    )  # fmt: skip


needs_mount = pytest.mark.skipif(not can_mount(), reason="no file systems can be mounted here")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """The digest of the run left alone."""
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(train_command(*FLAGS, "--workdir", run), check=True, capture_output=True)
    return outcome(run)


def outcome(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    result = json.loads((run / "result.json").read_text())
    return result["digest"], [json.loads(line)["step"] for line in lines]


def complaint(done):
    """The one line of a process that stopped as it should."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def assert_whole_checkpoints(run):
    checkpoints = cnn.CheckpointManager(run / "checkpoints")
    assert checkpoints.all_steps()
    for step in checkpoints.all_steps():
        checkpoints.read(step)


def on_a_small_disk(tmp_path, trouble, remedy, kilobytes=16_000):
    """Trains twice on a tmpfs of its own, with some trouble and then without it.

    The disk is at $1; `run` in it is the run directory, and is copied to $2 after each time.
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir(), kept.mkdir()
    train = " ".join(f"'{word}'" for word in train_command(*FLAGS))
    script = f"""
set -e
mount -t tmpfs -o size={kilobytes}k tmpfs "$1"
{trouble}
set +e
{train} --workdir "$1/run" > "$2/out1" 2> "$2/err1"; echo $? > "$2/code1"
set -e
cp -r "$1/run" "$2/first"
wait
{remedy}
set +e
{train} --workdir "$1/run" > "$2/out2" 2> "$2/err2"; echo $? > "$2/code2"
cp -r "$1/run" "$2/second"
"""
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(disk), str(kept)]
    subprocess.run(command, check=True, timeout=240)

    def done(number):
        out, err, code = ((kept / f"{name}{number}").read_text() for name in ("out", "err", "code"))
        return subprocess.CompletedProcess(command, int(code), out, err)

    return done(1), done(2), kept


@needs_mount
def test_a_full_disk(tmp_path, whole):
    """Full to the last page, but for a checkpoint or two; then some space is freed."""
    fill = 'head -c 14900k /dev/zero > "$1/others"'
    first, second, kept = on_a_small_disk(tmp_path, fill, 'rm "$1/others"')
    line = complaint(first)
    folder = tmp_path / "disk" / "run" / "checkpoints"
    assert f"(0.4 MB) could not be written: No space left on device in {folder}: free" in line
    assert_whole_checkpoints(kept / "first")
    step = cnn.CheckpointManager(kept / "first" / "checkpoints").latest_step()
    assert not any(kept.glob("first/checkpoints/.*")), "what could not be written takes no space"
    assert line.endswith(f"the same command then resumes from step {step}")
    assert second.returncode == 0, second.stderr
    assert f"resuming at step {step} of 88" in second.stdout
    assert outcome(kept / "second") == whole


@needs_mount
def test_a_disk_that_is_full_from_the_start(tmp_path, whole):
    """It is reported before any step is trained."""
    fill = 'head -c 20m /dev/zero > "$1/others" || true'
    first, second, kept = on_a_small_disk(tmp_path, fill, 'rm "$1/others"')
    assert "No space left on device" in complaint(first)
    assert "train loss" not in first.stdout
    assert second.returncode == 0, second.stderr
    assert outcome(kept / "second") == whole


@needs_mount
def test_a_disk_that_becomes_read_only(tmp_path, whole):
    watch = """
(until ls "$1/run/checkpoints/8" > /dev/null 2>&1; do sleep 0.01; done
mount --bind "$1/run" "$1/run" && mount -o remount,bind,ro "$1/run") &
"""
    first, second, kept = on_a_small_disk(tmp_path, watch, 'umount "$1/run"')
    line = complaint(first)
    assert f"Read-only file system in {tmp_path / 'disk' / 'run'}" in line
    assert "make it writable" in line
    assert_whole_checkpoints(kept / "first")
    assert second.returncode == 0, second.stderr
    assert "resuming at step" in second.stdout
    assert outcome(kept / "second") == whole


def test_a_limit_on_the_size_of_files(tmp_path, whole):
    """A quota that the operating system gives to everybody: `ulimit -f`."""
    run = tmp_path / "run"
    command = train_command(*FLAGS, "--workdir", run)

    limited = subprocess.run(
        ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", *command], capture_output=True, text=True
    )
    assert "File too large" in complaint(limited)
    assert "ulimit -f" in limited.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert outcome(run) == whole


@pytest.fixture
def between_calls(config, monkeypatch):
    """Has something done before some call of the compiled function."""
    config.runtime.checkpoint_every_steps = config.runtime.steps_per_execution = 2

    def before_call(number, act):
        watch_calls(monkeypatch, before=lambda calls: act() if len(calls) == number else None)

    return before_call


@pytest.mark.parametrize("what", ["run", "run/checkpoints"])
def test_a_directory_that_is_removed_and_put_back(tmp_path, config, between_calls, what, digits):
    state, _ = cnn.train_and_evaluate(config, tmp_path / "whole")
    gone, aside = tmp_path / what, tmp_path / "aside"

    def remove():
        while any(tmp_path.glob("run/checkpoints/.*")):
            time.sleep(0.01)  # what is being written would be made anew, and whole
        gone.rename(aside)

    between_calls(5, remove)
    with pytest.raises(cnn.UserError) as error:
        cnn.train_and_evaluate(config, tmp_path / "run")
    assert f"{tmp_path / 'run'}" in str(error.value)
    assert "was removed: put it back" in str(error.value)
    if what == "run":
        assert not gone.exists(), "nothing of it may be made anew"
    else:  # without its checkpoints it is not begun anew
        with pytest.raises(cnn.UserError, match="no checkpoint of it"):
            cnn.train_and_evaluate(config, tmp_path / "run")
    aside.rename(gone)
    again, _ = cnn.train_and_evaluate(config, tmp_path / "run")
    assert cnn.digest(again) == cnn.digest(state)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_folders_that_cannot_be_synced(tmp_path, config, digits, monkeypatch, number):
    """As on CIFS and some FUSE mounts: no reason not to train. A disk that fails is one."""
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(cnn.UserError, match=r"checkpoint of step 0 .*: Input/output error in"):
            cnn.train_and_evaluate(config, tmp_path / "run")
    else:
        state, _ = cnn.train_and_evaluate(config, tmp_path / "run")
        monkeypatch.undo()
        assert cnn.digest(state) == outcome(tmp_path / "run")[0]
        assert_whole_checkpoints(tmp_path / "run")


def test_a_record_that_was_cut_short_by_a_full_disk(tmp_path, config, between_calls, digits):
    """Half of it is in metrics.jsonl; the next start cuts that off and writes it again."""
    state, _ = cnn.train_and_evaluate(config, tmp_path / "whole")

    def fail():
        import cnn.runtime.run_directory

        original = cnn.runtime.run_directory.os.fsync

        def full(handle):
            if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
                os.truncate(tmp_path / "run" / "metrics.jsonl", 20)
                raise OSError(28, os.strerror(28))
            original(handle)

        patch.setattr(cnn.runtime.run_directory.os, "fsync", full)

    with pytest.MonkeyPatch.context() as patch:
        between_calls(3, fail)
        with pytest.raises(cnn.UserError, match="the run cannot continue: No space left on device"):
            cnn.train_and_evaluate(config, tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text()) == 20
    again, _ = cnn.train_and_evaluate(config, tmp_path / "run")
    assert cnn.digest(again) == cnn.digest(state)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [14, 28]
