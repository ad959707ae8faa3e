"""The model card: `README.md`, as the Hugging Face hub reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cnn.export.check import Check, is_short
from cnn.inference import TrainedModel
from cnn.metrics import wilson_interval

_STABLEHLO = """\
`model.stablehlo` needs jax only, on CPUs, NVIDIA GPUs and TPUs:

```python
import jax
import numpy as np

model = jax.export.deserialize(open("model.stablehlo", "rb").read())
logits = jax.jit(model.call)(images)
```

It was written by jax {jax}. JAX reads such a file for at least six months after that version,
and versions up to three weeks older read it too: see "Compatibility guarantees" in the
documentation of `jax.export`. After that, export the run again.
"""
_ONNX = """\
`model.onnx` needs an ONNX runtime, here onnxruntime:{short}

```python
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx")
(logits,) = model.run(["logits"], {{"image": images}})
```
"""
_SHORT = """ (it computes in float32 what the
model computes in bfloat16)"""
_WEIGHTS = """\
`model.safetensors` has the weights as Flax's linen modules have them, under the names
`COLLECTION.LAYER.NAME`, such as `{example}`. Kernels of convolutions are
[height, width, in, out], those of dense layers [in, out]. `config.json` has the fields of the
model, its classes, and the normalization that the weights expect of pixels.

```python
from safetensors.numpy import load_file

weights = load_file("model.safetensors")
```
"""


@dataclasses.dataclass(frozen=True)
class Score:
    """Test accuracy.

    Attributes:
      correct: images that were classified correctly.
      count: images of the test set.
      source: who counted.
    """

    correct: int
    count: int
    source: str


def measured(run: TrainedModel, logits: np.ndarray, labels: np.ndarray | None) -> Score | None:
    """The accuracy of logits; without labels what the run recorded."""
    if labels is None:
        return recorded(run)
    return Score(int((logits.argmax(-1) == labels).sum()), len(labels), "counted by this export")


def recorded(run: TrainedModel) -> Score | None:
    """The accuracy that the run recorded at this checkpoint; None within an epoch."""
    record = next((r for r in run.record.get("records", ()) if r["step"] == run.step), None)
    if record is None:
        return None
    count = record["test_count"]
    return Score(round(record["test_accuracy"] * count), count, "recorded in training")


def json_bytes(value: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def model_card(
    run: TrainedModel,
    sizes: Mapping[str, int],
    checks: Mapping[str, Check],
    score: Score | None,
    checked_on: str | None,
) -> str:
    """The text of `README.md`.

    Args:
      run: the model.
      sizes: bytes of the exported files by name.
      checks: of these files, by name; empty if they were not checked.
      score: on the test set, if it is known.
      checked_on: which images the checks are about.
    """
    name = f"{type(run.model).__name__} on {run.dataset['name']}"
    height, width, channels = run.image_shape
    # What computes the same elsewhere; the rest names folders of this machine.
    config = {name: value for name, value in run.config.items() if name != "runtime"}
    parts = [
        f"---\n{_front_matter(run, name, score)}---\n\n# {name}\n",
        f"An image classifier with {len(run.class_names)} classes for images of {height}x{width} "
        f"pixels and {channels} channel{'s' * (channels > 1)}, trained with `cnn`, a JAX and Flax "
        f"codebase.\n",
        _failures(checks),
        "## Figures\n\n" + _table(_figures(run, score)),
        "## Use\n\nThe programs take `images`, uint8 "
        f"[B, {height}, {width}, {channels}] with any B, and return `logits`, float32 "
        f"[B, {len(run.class_names)}]. They normalize the pixels themselves. The class is the "
        "largest logit.\n",
    ]
    if "model.stablehlo" in sizes:
        parts.append(_STABLEHLO.format(jax=jax.__version__))
    if "model.onnx" in sizes:
        parts.append(_ONNX.format(short=_SHORT if is_short(run) else ""))
    if "model.safetensors" in sizes:
        parts.append(_WEIGHTS.format(example=_example(run)))
    parts += [
        "## Files\n\n" + _files(sizes, checks, checked_on),
        "## Classes\n\n" + ", ".join(f"{i} {n}" for i, n in enumerate(run.class_names)) + "\n",
        "## Data\n\n" + _data(run),
        "## Intended use and limitations\n\n" + _limitations(run),
        "## Training\n\n```json\n" + json.dumps(config, indent=2, sort_keys=True) + "\n```\n",
    ]
    return "\n".join(filter(None, parts))


def _front_matter(run: TrainedModel, name: str, score: Score | None) -> str:
    """YAML, written as JSON values, which are YAML too."""
    dataset = run.dataset["name"]
    fields: dict[str, Any] = {
        "library_name": "jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "jax", "flax", run.config["model"].get("name", "cnn")],
        "datasets": [dataset],
        "metrics": ["accuracy"],
    }
    if score is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": "test"},
            "metrics": [{"type": "accuracy", "value": score.correct / score.count}],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())


def _figures(run: TrainedModel, score: Score | None) -> dict[str, str]:
    record, arrays = run.record, jax.tree.leaves(run.state.params)
    figures = {"test accuracy": "not known for this checkpoint"}
    if score is not None:
        low, high = wilson_interval(score.correct, score.count)
        figures["test accuracy"] = (
            f"{score.correct / score.count:.2%} of {score.count:,} images ({score.source}); 95 % "
            f"interval {low:.2%} to {high:.2%} (Wilson score; one run)"
        )
    epoch = next((r["epoch"] for r in record.get("records", ()) if r["step"] == run.step), None)
    figures |= {
        "parameters": f"{sum(leaf.size for leaf in arrays):,}",
        "steps": f"{run.step:,}" + (f" (epoch {epoch:g})" if epoch is not None else ""),
        "batch size": str(run.config["batch_size"]),
        "seed": str(run.config["seed"]),
    }
    if digest := record.get("digest"):
        figures["digest of the state"] = f"`{digest}`"
    if environments := record.get("environments"):
        figures |= _environment(environments[-1])
    return figures


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    devices = environment.get("devices") or ()
    processor = (environment.get("processor") or {}).get("model")
    packages = environment.get("packages") or {}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    known = {
        "trained on": f"{len(devices)} x {devices[0]}" if devices else None,
        "processor": processor,
        "versions": versions,
        "commit": environment.get("commit"),
    }
    return {name: str(value) for name, value in known.items() if value}


def _table(rows: Mapping[str, str]) -> str:
    body = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _files(sizes: Mapping[str, int], checks: Mapping[str, Check], checked_on: str | None) -> str:
    def result(name: str) -> str:
        if name not in checks:
            return "not checked"
        return ("" if checks[name].passed else "**FAILED**: ") + checks[name].text

    rows = "".join(
        f"| `{name}` | {size:,} | {_cell(result(name))} |\n" for name, size in sizes.items()
    )
    note = (
        f"\nEach file was loaded on a CPU in a new process without `cnn`, and compared with the "
        f"run on {checked_on}.\n"
        if checks
        else ""
    )
    return f"| file | bytes | compared with the run |\n|---|---|---|\n{rows}{note}"


def _failures(checks: Mapping[str, Check]) -> str:
    failed = [name for name, check in checks.items() if not check.passed]
    if not failed:
        return ""
    return f"**Do not use {', '.join(failed)}**: not the model of the run, see Files below.\n"


def _example(run: TrainedModel) -> str:
    path, _ = jax.tree.leaves_with_path(run.variables)[-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _data(run: TrainedModel) -> str:
    data = run.dataset
    resized = f" Images of other sizes were resized ({data['resize']})." if "resize" in data else ""
    return (
        f"{data['name']}: {data['train_count']:,} training and {data['test_count']:,} test images, "
        f"normalization `{data['normalization']}`, fingerprint `{data['fingerprint']}`.{resized}\n"
    )


def _limitations(run: TrainedModel) -> str:
    height, width, _ = run.image_shape
    return (
        f"For research and teaching, on images like those of {run.dataset['name']}. The accuracy "
        f"above is all that was measured: not other data, not the calibration of the "
        f"probabilities, not robustness, not bias. An image of none of the classes gets one of "
        f"them all the same, and another image must be scaled to {height}x{width} pixels first. "
        f"The licenses of the data and of the code are not stated here; see their sources.\n"
    )
