"""What the README tells people to type."""

import json
import os
import re
import shutil
import subprocess
import sys

import PIL.Image
import pytest

from tests.helpers import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
MAIN, TEST = (text.strip() for language, text in BLOCKS if "python3 -m venv" in text)


def test_the_two_commands_are_one_line_each():
    assert MAIN.count("\n") == TEST.count("\n") == 0
    assert MAIN.endswith("train.py --config configs/digits.py")
    assert TEST.endswith("-m pytest")


PREDICT, LOOP = (text for language, text in BLOCKS if language == "python")


def run_script(script, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_image_is_classified_as_printed(tmp_path, trained_run, digits):
    shutil.copytree(trained_run, tmp_path / "checkpoints" / "digits")
    PIL.Image.fromarray(digits.test.images[0, ..., 0]).save(tmp_path / "seven.png")
    assert run_script(PREDICT, tmp_path).strip() in digits.class_names


def test_the_loop_runs_as_printed(tmp_path):
    accuracies = re.findall(r"test accuracy ([\d.]+)%", run_script(LOOP, tmp_path))
    accuracies = [float(value) for value in accuracies]
    assert len(accuracies) == 5
    assert accuracies[-1] > 90


PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/NOTES.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"\b(?:benchmarks|cnn|configs|docs|tests)/[\w./]+\.\w+", text):
        assert "NAME" in name or (REPOSITORY / name).exists(), name
    for module in re.findall(r"python -m (benchmarks\.[\w.]+\w)", text):
        file = REPOSITORY / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_command_in_a_fresh_clone(tmp_path):
    """Makes an environment and trains, exactly as printed."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    done = subprocess.run(MAIN, shell=True, cwd=clone, capture_output=True, text=True)
    shutil.rmtree(clone / ".venv", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = clone / "checkpoints" / "digits"
    assert json.loads((run / "result.json").read_text())["test_accuracy"] >= 0.97
    assert (run / "curves.png").exists()
    assert any((run / "checkpoints").iterdir())
