"""Exported files against the run: each is loaded in a new process that cannot import `cnn`."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from cnn.errors import one_line
from cnn.export import weights
from cnn.inference import TrainedModel
from cnn.runtime.checkpoints import digest

# Logits may differ by this many roundings of the largest one. Two correct programs add the same
# numbers in another order: at most 27 were seen between float32 programs of the three models.
_ROUNDINGS = 200
# A bfloat16 model rounds at each layer where the ONNX program does not: at most 4 were seen.
_SHORT_ROUNDINGS = 32
_BATCH = 500  # images per call

_BLOCK = "import sys\nfor name in {blocked}: sys.modules[name] = None\n"
_CALLS = (
    f"images = np.load(sys.argv[2], mmap_mode='r')\n"
    f"parts = [call(np.array(images[i:i + {_BATCH}])) for i in range(0, len(images), {_BATCH})]\n"
    f"np.save(sys.argv[3], np.concatenate(parts))\n"
)
# By the name of the file: a script with the arguments file, images, results.
_SCRIPTS = {
    "model.stablehlo": _BLOCK.format(blocked=("cnn", "flax")) + "import jax, numpy as np\n"
    "model = jax.export.deserialize(open(sys.argv[1], 'rb').read())\n"
    "call = jax.jit(model.call)\n" + _CALLS,
    "model.onnx": _BLOCK.format(blocked=("cnn", "flax", "jax"))
    + "import numpy as np, onnxruntime\n"
    "model = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    "call = lambda images: model.run(['logits'], {'image': images})[0]\n" + _CALLS,
    "model.safetensors": _BLOCK.format(blocked=("cnn", "flax", "jax")) + "import numpy as np\n"
    "from safetensors.numpy import load_file\n"
    "np.savez(sys.argv[3], **load_file(sys.argv[1]))\n",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """How a file compares with the run.

    Attributes:
      passed: whether it is as good as the run.
      text: one line for people, such as "equal classes on 10,000 images, ...".
      figures: the measured numbers, as JSON values.
    """

    passed: bool
    text: str
    figures: dict[str, float | int]


def check_file(file: Path, run: TrainedModel, images: np.ndarray, logits: np.ndarray) -> Check:
    """Loads an exported file as its user would, and compares.

    Args:
      file: one of those that `cnn.commands.export` writes.
      run: what it was made from.
      images: uint8[N, H, W, C].
      logits: `run.logits(images)`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "images.npy"), Path(folder, "made.npy")
        if file.suffix == ".safetensors":
            made = made.with_suffix(".npz")
        np.save(given, images)
        command = [sys.executable, "-I", "-c", _SCRIPTS[file.name], *map(str, (file, given, made))]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return Check(False, f"cannot be loaded ({one_line(reason, limit=200)})", {})
        if file.suffix == ".safetensors":
            with np.load(made) as loaded:
                return compare_arrays(dict(loaded), weights.named_arrays(run))
        return compare_logits(np.load(made), logits, is_short=is_short(run))


def is_short(run: TrainedModel) -> bool:
    """Whether the model computes in bfloat16."""
    return run.config["model"].get("dtype") == "bfloat16"


def compare_arrays(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> Check:
    """Whether all bits are equal."""
    equal = digest(found) == digest(wanted)
    text = "are equal to the bit" if equal else "differ from the checkpoint"
    return Check(equal, f"{len(wanted)} arrays {text}", {"arrays": len(wanted)})


def compare_logits(found: np.ndarray, wanted: np.ndarray, *, is_short: bool = False) -> Check:
    """Whether classes are equal and logits within a bound that follows from rounding.

    An image whose two largest logits differ by less than the bound may have either class.

    >>> wanted = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    >>> compare_logits(wanted, wanted).text
    'equal classes on 2 images, largest difference 0.0e+00'
    >>> compare_logits(wanted[:, ::-1], wanted).passed
    False
    """
    epsilon = 2.0**-8 if is_short else 2.0**-24
    roundings = _SHORT_ROUNDINGS if is_short else _ROUNDINGS
    bound = roundings * epsilon * max(float(np.abs(wanted).max()), 1.0)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        text = f"results are {found.dtype}{list(found.shape)}, not float32{list(wanted.shape)}"
        return Check(False, text, {})
    difference = float(np.abs(found - wanted).max())
    differs = found.argmax(-1) != wanted.argmax(-1)
    first, second = np.moveaxis(np.sort(wanted, axis=-1)[:, [-1, -2]], -1, 0)
    tied = int(np.sum(differs & (first - second < bound)))
    wrong = int(differs.sum()) - tied
    count = len(wanted)
    what = "equal classes on" if not wrong else f"other classes on {wrong:,} of"
    text = f"{what} {count:,} images, largest difference {difference:.1e}"
    if tied:
        text += f" ({tied:,} within rounding of a tie)"
    # A NaN is not within the bound.
    within = difference <= bound
    if not within:
        text += f", more than {bound:.1e}"
    figures = {"images": count, "largest_difference": difference, "bound": bound, "ties": tied}
    return Check(not wrong and within, text, figures | {"other_classes": wrong})
