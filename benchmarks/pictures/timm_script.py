"""Runs timm's `inference.py` with the baseline network, for `benchmarks.pictures.predict`.

    python benchmarks/pictures/timm_script.py INFERENCE_PY FOLDER RESULTS

timm's package does not hold the script; it is in its repository.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from timm.models import register_model
from torch import nn

from benchmarks.peers.contenders.pytorch import _baseline as build_network

_NAME = "keras_tutorial_cnn"


def main(script: str, folder: str, results: str) -> None:
    """Registers the network, and runs the script on a CPU."""

    def create(pretrained: bool = False, **_: Any) -> nn.Module:
        network: Any = build_network()
        network.num_classes = 10
        return network

    create.__name__ = _NAME
    create.__module__ = "timm.models.registered_here"
    sys.modules[create.__module__] = type(sys)(create.__module__)
    register_model(create)
    options = {
        "--model": _NAME,
        "--device": "cpu",
        "--workers": "2",
        "--batch-size": "256",
        "--num-classes": "10",
        "--crop-pct": "1.0",
        "--results-dir": results,
        "--log-freq": "1000",
    }
    flags = [word for pair in options.items() for word in pair]
    size = ["--input-size", "3", "32", "32"]
    sys.argv = [script, "--data-dir", folder, *flags, *size, "--no-console-results"]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
