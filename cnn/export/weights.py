"""The weights of a trained model as a safetensors file, and its `config.json`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cnn.inference import TrainedModel


def named_arrays(run: TrainedModel) -> dict[str, np.ndarray]:
    """Parameters and other collections by name, such as `params.Conv_0.kernel`."""
    leaves = jax.tree.leaves_with_path(jax.device_get(run.variables))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }


def safetensors(run: TrainedModel) -> bytes:
    """The arrays of `named_arrays`, which `safetensors.numpy.load_file` reads."""
    from safetensors.numpy import save  # an extra

    return save(named_arrays(run), metadata={"format": "flax", "step": str(run.step)})


def config(run: TrainedModel) -> dict[str, Any]:
    """What `config.json` holds: the model's fields, its classes, and how it takes images."""
    mean, std = run.normalization
    return {
        "model_type": run.config["model"]["name"],
        "architectures": [type(run.model).__name__],
        "model": run.config["model"],
        "image_shape": list(run.image_shape),
        "num_labels": len(run.class_names),
        "id2label": {str(label): name for label, name in enumerate(run.class_names)},
        "label2id": {name: label for label, name in enumerate(run.class_names)},
        # What the weights take; the programs take uint8 pixels and do this themselves.
        "normalization": {
            "formula": "(pixel / 255 - mean) / std",
            "mean": mean.tolist(),
            "std": std.tolist(),
        },
        "dataset": {name: run.dataset[name] for name in ("name", "fingerprint", "train_count")},
        "step": run.step,
        "seed": run.config["seed"],
    }
