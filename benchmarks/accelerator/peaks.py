"""The most that a device can do, by what JAX calls it."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Of one JAX device.

    Attributes:
      tflops: dense bfloat16 products with float32 sums, 1e12 operations per second.
      source: where the figure is from.
    """

    tflops: float
    source: str


_TPU_DOCS = "Cloud TPU documentation, system architecture"
# Exactly as `device_kind` has it. The two cores of a v2 or v3 chip are two JAX devices.
_TPUS = {
    "TPU v2": Peak(45 / 2, f"{_TPU_DOCS}: 45 a chip of two cores"),
    "TPU v3": Peak(123 / 2, f"{_TPU_DOCS}: 123 a chip of two cores"),
    "TPU v4": Peak(275, _TPU_DOCS),
    "TPU v5 lite": Peak(197, f"{_TPU_DOCS}, v5e"),
    "TPU v5e": Peak(197, _TPU_DOCS),
    "TPU v5": Peak(459, f"{_TPU_DOCS}, v5p"),
    "TPU v5p": Peak(459, _TPU_DOCS),
    "TPU v6 lite": Peak(918, f"{_TPU_DOCS}, v6e"),
    "TPU v6e": Peak(918, _TPU_DOCS),
}
# How `device_kind` begins; the first that fits counts. NVIDIA states twice these figures for
# matrices of which half is zero.
_GPUS = {
    "NVIDIA A100": Peak(312, "NVIDIA A100 datasheet"),
    "NVIDIA H100 PCIe": Peak(756, "NVIDIA H100 PCIe datasheet"),
    "NVIDIA H100 NVL": Peak(835, "NVIDIA H100 datasheet, NVL"),
    "NVIDIA H100": Peak(989, "NVIDIA H100 datasheet, SXM"),
    "NVIDIA H200 NVL": Peak(835, "NVIDIA H200 datasheet, NVL"),
    "NVIDIA H200": Peak(989, "NVIDIA H200 datasheet, SXM"),
}


def peak(device_kind: str) -> Peak | None:
    """The peak of a device; None if it is not in the table.

    >>> peak("NVIDIA H100 80GB HBM3").tflops, peak("TPU v3").tflops, peak("cpu")
    (989, 61.5, None)
    """
    if device_kind in _TPUS:
        return _TPUS[device_kind]
    return next((one for name, one in _GPUS.items() if device_kind.startswith(name)), None)
