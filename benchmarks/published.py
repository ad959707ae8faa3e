"""Published speed runs on CIFAR-10, for comparison; each on the device that it names.

Seconds include the whitening, all steps and the last evaluation with test-time augmentation, and
exclude compilation and the loading of the images. FLOPs are those that the source states.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A mean over many runs.

    Attributes:
      name: of the script or the method.
      accuracy: the mean, a fraction.
      seconds: of a run.
      device: on which.
      pflop: of a run, 1e15 operations; None if the source does not state it.
      source: where it is stated.
    """

    name: str
    accuracy: float
    seconds: float
    device: str
    pflop: float | None
    source: str


_AIRBENCH = "KellerJordan/cifar10-airbench"
_A100 = "A100"

PUBLISHED = (
    Published("hlb-CIFAR10", 0.94, 6.25, _A100, 0.587, "tysam-code/hlb-CIFAR10 0.7"),
    Published("airbench94", 0.9401, 3.83, _A100, 0.36, f"{_AIRBENCH}, legacy/airbench94.py"),
    Published("airbench94, Muon", 0.9401, 2.59, _A100, 0.29, f"{_AIRBENCH}, airbench94_muon.py"),
    Published("hiverge", 0.9401, 2.015, _A100, None, "hiverge/cifar10-speedrun"),
    Published("airbench95", 0.9501, 10.4, _A100, 1.39, f"{_AIRBENCH}, legacy/airbench95.py"),
    Published("airbench96", 0.9603, 34.7, _A100, 4.91, f"{_AIRBENCH}, legacy/airbench96.py"),
    Published("airbench96, faster", 0.96, 27.3, _A100, 3.1, f"{_AIRBENCH}, airbench96_faster.py"),
    Published("ResNet-18", 0.96, 420.0, _A100, 32.3, f"{_AIRBENCH}, README"),
)
