"""train.py as a person uses it."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnn.config import fields, load_config
from tests.helpers import ENDLESS, REPOSITORY, train_command

DIGITS = REPOSITORY / "configs" / "digits.py"


@pytest.fixture
def train(digits, in_process):
    """Runs train.py in this process, where the digits are prepared."""
    return in_process


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
        (["--config.num_epochs=0"], "must be more than 0"),
        (["--config.optimizer.learning_rate=-1"], "must lie between 1e-37 and"),
        (["--config.optimizer.name=adan"], "did you mean adam?"),
        (["--config.model.dtype=float16"], "must be one of float32, bfloat16"),
        (["--config.runtime.platform=npu"], "must be one of auto, cpu, gpu, tpu"),
        (["--config.runtime.platform=tpu"], "JAX finds no TPU here"),
        (["--config.dataset.name=digitz"], "digits"),
        (["--config", DIGITS, "--config.model.padding=VALID"], "too small"),
        (
            ["--config", DIGITS, "--config.batch_size=2000"],
            "between 1 and 1,437, the number",
        ),
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


def test_help_has_sections_and_the_defaults_of_the_config(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = train("--help", "--config", "digits")
    assert code == 0
    assert all(len(line) < 80 for line in out.splitlines())
    words = " ".join(out.split())
    assert "optimizer: --config.optimizer.name" in words
    assert "within an epoch. (default: 20.0)" in words
    assert "--config.num_epochs X Passes over the training images; a" in words
    known = fields(load_config(DIGITS))
    assert all(f"--config.{name} " in words for name in known)
    assert words.count("(default: ") == len(known) + 2


def test_help_has_the_fields_of_groups(train):
    code, out, _ = train("--help", "--config", "speed94")
    assert code == 0
    words = " ".join(out.split())
    assert "optimizer.groups.head: --config.optimizer.groups.head.name" in words
    assert "--config.optimizer.groups.head.learning_rate X" in words


def test_a_config_is_found_by_its_name_and_the_next_command_works(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = train("--config", "digits.py", "--config.num_epochs=1", "--workdir", "run")
    assert code == 0
    command = out.partition("how much the result varies:\n")[2]
    words = shlex.split(command.replace("\\\n", ""))  # as a shell continues lines
    assert words[:2] == ["python", "train.py"]
    assert words[-2:] == ["--workdir", "run-seed1"]
    code, _, err = train(*words[2:])
    assert code == 0, err
    first, second = (
        json.loads(Path(f"{run}/result.json").read_text()) for run in ("run", "run-seed1")
    )
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["num_epochs"] == second["num_epochs"] == 1


def test_a_flag_of_another_optimizer_is_refused(train, tmp_path):
    flags = "--config=digits", "--config.optimizer.momentum=0.5", "--workdir", tmp_path / "run"
    code, out, err = train(*flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown config field optimizer.momentum; the optimizer that is")
    code, out, _ = train(*flags, "--config.optimizer.name=sgd", "--config.num_epochs=1")
    assert code == 0
    assert "--config.optimizer.momentum=0.5" in out


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


def test_an_interrupted_run_continues_with_the_same_command(
    run_train, train, tmp_path, monkeypatch
):
    import cnn.runs

    def interrupt(*_):
        raise KeyboardInterrupt

    flags = ("--config", DIGITS, "--config.num_epochs=1", "--workdir", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(cnn.runs, "final_result", interrupt)
        code, _, err = train(*flags)
    assert (code, err.count("\n")) == (130, 1)
    assert "the same command resumes the run" in err
    code, out, _ = train(*flags)
    assert code == 0
    assert "finished: test accuracy" in out


def test_a_second_process_in_a_directory_is_refused_at_once(run_train, running):
    process, run = running
    begun = time.monotonic()
    second = run_train(*ENDLESS, "--workdir", run)
    assert second.returncode == 2
    assert second.stdout == ""  # before it loads anything
    (line,) = second.stderr.splitlines()
    assert f"{run} is being trained in by process {process.pid} on " in line
    assert time.monotonic() - begun < 30
    assert process.poll() is None


def test_two_processes_started_together(tmp_path, digits):
    """One trains, the other is refused, whichever comes first."""
    run = tmp_path / "run"
    command = train_command("--config", DIGITS, "--config.num_epochs=1", "--workdir", run)
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    codes = [process.returncode for process in processes]
    finished = [out for out, _ in outputs if "finished: test accuracy" in out]
    assert len(finished) == 1, outputs
    for code, (out, err) in zip(codes, outputs, strict=True):
        refused = code == 2 and "is being trained in by process" in err
        assert (code == 0 and "finished" in out) or refused, outputs
    records = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [44]


def test_nothing_is_unpickled_and_no_tensorflow_imported(run_train, tmp_path):
    """Neither while a run prepares data and trains, nor when it is taken up again.

    A `tensorflow` that fails on import stands in the way of everyone who tries.
    """
    trap = tmp_path / "trap"
    (trap / "tensorflow").mkdir(parents=True)
    (trap / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    (trap / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def hook(event, args):\n"
        "    if event == 'pickle.find_class':\n"
        "        os.write(2, b'unpickled')\n"
        "        os._exit(9)\n"
        "sys.addaudithook(hook)\n"
    )
    run = tmp_path / "run"
    variables = {
        "PYTHONPATH": str(trap),
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    caught = subprocess.run(
        [sys.executable, "-c", "import pickle; pickle.loads(pickle.dumps(OSError))"],
        env={**os.environ, **variables},
    )
    assert caught.returncode == 9, "the trap must work"
    for _ in range(2):
        done = run_train(
            "--config", DIGITS, "--config.num_epochs=1", "--workdir", run, **variables
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (run / "result.json").unlink()
