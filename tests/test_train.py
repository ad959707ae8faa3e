"""train.py as a person uses it."""

import json
import runpy
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, train_command

DIGITS = REPOSITORY / "configs" / "digits.py"


@pytest.fixture
def train(monkeypatch, capsys, digits):
    """Runs train.py in this process; gives exit code, standard output and standard error."""

    capsys.readouterr()  # of preparing the digits

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        try:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--config=none.py"], "config file none.py does not exist"),
        (["--config", REPOSITORY / "pyproject.toml"], "is broken: SyntaxError"),
        (["--config"], "expected one argument"),
        (["--confg=configs/digits.py"], "unknown flag '--confg=configs/digits.py'"),
        (["configs/digits.py"], "unknown flag 'configs/digits.py'"),
        (["--config.batchsize=64"], "did you mean batch_size?"),
        (["--config.batch_size=0"], "must be 1 or more"),
        (["--config.batch_size=big"], "is not a whole number"),
        (["--config.num_epochs=0"], "must be 1 or more"),
        (["--config.optimizer.learning_rate=-1"], "must be positive"),
        (["--config.optimizer.name=adan"], "must be one of adam, adamw, sgd"),
        (["--config.model.dtype=float16"], "must be one of float32, bfloat16"),
        (["--config.platform=npu"], "must be one of auto, cpu, gpu, tpu"),
        (["--config.platform=tpu"], "JAX finds no TPU here"),
        (["--config.dataset.name=digitz"], "digits"),
        (["--config", DIGITS, "--config.model.padding=VALID"], "too small"),
        (["--config", DIGITS, "--config.batch_size=2000"], "more than the 1,437 training images"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train, tmp_path, flags, complaint):
    workdir = tmp_path / "run"
    code, out, err = train("--workdir", workdir, *flags)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert not workdir.exists()


def test_a_work_directory_below_a_file(train, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = train("--config", DIGITS, "--workdir", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot be written" in err
    assert err.count("\n") == 1


def test_help_lists_every_field_and_an_example(train):
    code, out, _ = train("--help")
    assert code == 0
    assert "--config.optimizer.learning_rate" in out
    assert "python train.py --config configs/digits.py" in out


def test_digits_reach_97_percent_and_the_same_command_says_finished(run_train, tmp_path):
    flags = ("--config", DIGITS, "--workdir", tmp_path / "run")
    done = run_train(*flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_accuracy"] >= 0.97
    assert f"test accuracy {100 * result['test_accuracy']:.2f} % of 360 images" in done.stdout
    assert f"digest: {result['digest']}" in done.stdout
    again = run_train(*flags)
    assert again.returncode == 0
    assert "finished before: test accuracy" in again.stdout


def test_no_tensorflow_is_imported_even_where_it_is_installed(run_train, tmp_path):
    """A `tensorflow` that fails on import stands in the way of everyone who tries."""
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    done = run_train(
        "--config", DIGITS, "--config.num_epochs=1", "--workdir", tmp_path / "run",
        PYTHONPATH=str(trap.parent), TFDS_DATA_DIR=str(tmp_path / "tfds"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_an_interrupted_run_continues_with_the_same_command(
    run_train, train, tmp_path, monkeypatch
):
    import cnn.training

    def interrupt(*_):
        raise KeyboardInterrupt

    flags = ("--config", DIGITS, "--config.num_epochs=1", "--workdir", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(cnn.training, "conclude", interrupt)
        code, _, err = train(*flags)
    assert (code, err.count("\n")) == (130, 1)
    assert "the same command continues the run" in err
    code, out, _ = train(*flags)
    assert code == 0
    assert "finished: test accuracy" in out


def test_a_damaged_checkpoint_is_one_line(run_train, tmp_path):
    run = tmp_path / "run"
    flags = ("--config", DIGITS, "--config.num_epochs=1", "--workdir", run)
    assert run_train(*flags).returncode == 0
    (run / "result.json").unlink()  # as if it had been killed just before its end
    for path in (run / "checkpoints" / "44" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run_train(*flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"error: checkpoint {run / 'checkpoints' / '44'} cannot be restored" in done.stderr


def read_run(run):
    """What must not depend on when a run was killed."""
    result = json.loads((run / "result.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [{**json.loads(line), "images_per_second": None} for line in lines]
    steps = {path.name for path in (run / "checkpoints").iterdir()}
    return result["digest"], result["test_accuracy"], records, steps


def test_a_run_killed_with_sigkill_ends_in_the_same_bits(run_train, tmp_path):
    """Killed twice: after its third checkpoint, and after its second record."""
    flags = ("--config", DIGITS, "--config.num_epochs=4", "--config.checkpoint_every_steps=5")
    assert run_train(*flags, "--workdir", tmp_path / "whole").returncode == 0
    run = tmp_path / "killed"

    def at_step_15():
        return any(path.name == "15" for path in run.glob("checkpoints/*"))

    def two_records():
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    for reached in (at_step_15, two_records):
        command = train_command(*flags, "--workdir", run)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not reached():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            process.kill()
        assert not (run / "result.json").exists()
    resumed = run_train(*flags, "--workdir", run)
    assert "resuming at step" in resumed.stdout
    assert read_run(run) == read_run(tmp_path / "whole")
