"""Writes a run as files that other programs read, with a model card.

    python -m cnn export checkpoints/baseline
    python -m cnn export checkpoints/baseline --format onnx --output exported

    model.stablehlo    the program for CPUs, NVIDIA GPUs and TPUs; it needs jax only
    model.onnx         the program for ONNX runtimes
    model.safetensors  the weights by name, with config.json
    README.md          a model card as the Hugging Face hub reads it

The programs take uint8 images [B, H, W, C] and return float32 logits [B, K]. Each file is then
loaded in a new process without this package, on the CPU, and compared with the run on its test
images; exit code 1 means that one differs. ONNX and safetensors need an extra:
pip install -e '.[export]'
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn.commands.common import (
    add_run_arguments,
    make_folder,
    opened_run,
    output_folder,
    print_json,
    run_dataset,
)
from cnn.errors import UserError
from cnn.export import card, weights
from cnn.export.check import Check, check_file
from cnn.export.onnx_graph import onnx
from cnn.export.program import stablehlo
from cnn.inference import TrainedModel
from cnn.runtime.disk import atomic_write
from cnn.runtime.screen import log, log_warning, shown, waiting

# By format: what makes the file `model.FORMAT`, and the packages that it needs beyond our own.
_FORMATS: dict[str, tuple[Callable[[TrainedModel], bytes], tuple[str, ...]]] = {
    "stablehlo": (stablehlo, ()),
    "onnx": (onnx, ("jax2onnx", "onnxruntime")),
    "safetensors": (weights.safetensors, ("safetensors",)),
}
_NUM_RANDOM = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    # On the CPU alone: a file is then the same wherever it is made, and no GPU rounds the check.
    add_run_arguments(parser, platform="cpu")
    parser.add_argument("--output", metavar="DIR", help="where the files go (default: RUN/export)")
    parser.add_argument(
        "--format",
        default=",".join(_FORMATS),
        metavar="LIST",
        help="which files, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare them with the run"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Makes all files, then writes and checks them; 1 if a check fails."""
    formats = _chosen(arguments.format)
    with opened_run(arguments) as model:
        default = model.path / "export"
        folder = output_folder(default if arguments.output is None else arguments.output)
        made: dict[str, bytes] = {}
        for name in formats:
            with waiting(f"making model.{name}"):
                made[f"model.{name}"] = _FORMATS[name][0](model)
        make_folder(folder)
        # No card of an earlier export may describe these files while they are checked.
        (folder / "README.md").unlink(missing_ok=True)
        for name, data in made.items():
            _write(folder / name, data)
        test = _test_images(model) if arguments.check else None
        checks = _checks(model, folder, made, test) if test else {}
    scores = card.measured(model, test.logits, test.labels) if test else card.recorded(model)
    if "safetensors" in formats:
        _write(folder / "config.json", card.json_bytes(weights.config(model)))
    sizes = {name: len(data) for name, data in made.items()}
    source = test.source if test else None
    text = card.model_card(model, sizes, checks, scores, source)
    _write(folder / "README.md", text.encode())
    passed = all(check.passed for check in checks.values())
    if arguments.json:
        print_json(_as_json(model, folder, sizes, checks, source))
    else:
        _report(folder, sizes, checks)
    return 0 if passed else 1


class _Test:
    """Images to compare on, and what the run makes of them; labels None if they are random."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, source: str) -> None:
        self.images, self.labels, self.source = images, labels, source
        self.logits = np.zeros((0, 0), np.float32)


def _chosen(text: str) -> Sequence[str]:
    formats = list(dict.fromkeys(filter(None, (word.strip() for word in text.split(",")))))
    unknown = [name for name in formats if name not in _FORMATS]
    if unknown or not formats:
        what = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"--format asks for {what}; known: {', '.join(_FORMATS)}")
    for name in formats:
        for package in _FORMATS[name][1]:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--format={name} needs {package}, which is not installed: pip install -e "
                    f"'.[export]', or choose others, such as --format=stablehlo"
                )
    return formats


def _write(file: Path, data: bytes) -> None:
    with atomic_write(file) as stream:
        stream.write(data)


def _test_images(model: TrainedModel) -> _Test:
    try:
        split = run_dataset(model).test
        test = _Test(split.images, split.labels, f"test images of {model.dataset['name']}")
    except UserError as error:
        log_warning(f"the files are compared on {_NUM_RANDOM:,} random images, as {error}")
        shape = (_NUM_RANDOM, *model.image_shape)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        test = _Test(images, None, "random images")
    with waiting("computing the logits of the run"):
        test.logits = model.logits(test.images)
    return test


def _checks(
    model: TrainedModel, folder: Path, made: dict[str, bytes], test: _Test
) -> dict[str, Check]:
    checks = {}
    for name in made:
        with waiting(f"checking {name}"):
            checks[name] = check_file(folder / name, model, test.images, test.logits)
    return checks


def _as_json(
    model: TrainedModel,
    folder: Path,
    sizes: dict[str, int],
    checks: dict[str, Check],
    source: str | None,
) -> dict[str, Any]:
    files = {
        name: {"bytes": size} | ({"check": _check_json(checks[name])} if name in checks else {})
        for name, size in sizes.items()
    }
    return {
        "run": str(model.path),
        "step": model.step,
        "output": str(folder),
        "checked_on": source,
        "passed": all(check.passed for check in checks.values()) if checks else None,
        "files": files,
    }


def _check_json(check: Check) -> dict[str, Any]:
    return {"passed": check.passed, "text": check.text, **check.figures}


def _report(folder: Path, sizes: dict[str, int], checks: dict[str, Check]) -> None:
    width = max(map(len, sizes))
    for name, size in sizes.items():
        line = f"{name:<{width}}  {size / 1e6:6.2f} MB"
        if name in checks:
            mark = "" if checks[name].passed else "FAILED: "
            line += f"  {mark}{checks[name].text}"
        log(line)
    log(f"see {shown(folder / 'README.md')}")
