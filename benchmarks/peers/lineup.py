"""The contenders of `benchmarks.peers`, and what each must be able to do."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from benchmarks.peers.contenders.problem import DTYPES, NETWORKS
from benchmarks.workers import JAX_ENV
from cnn import UserError


class Program(Protocol):
    """One network with its batches, ready to run in one framework.

    Every method returns only when the work is done.
    """

    def reset(self) -> None:
        """Restores the shared initial weights, with a new optimizer state."""
        ...

    def losses(self, count: int) -> list[float]:
        """Trains `count` steps; the mean loss of each batch before its update."""
        ...

    def logits(self) -> np.ndarray:
        """`float[B, K]` of the first batch, in inference mode."""
        ...

    def train(self, steps: int) -> None:
        """Trains `steps` steps over the batches in turn."""
        ...

    def infer(self, steps: int) -> None:
        """Computes the logits of `steps` batches."""
        ...


@dataclasses.dataclass(frozen=True)
class Contender:
    """One framework in one way of using it.

    Attributes:
      group: what is compared; the best variant of a group counts.
      variant: how it is used; "" if there is one way only.
      requires: the packages it imports.
      env: environment variables of its worker; None unsets one.
      phases: "train", "infer" or both.
      networks: those it implements.
      dtypes: those it computes in.
    """

    group: str
    variant: str
    requires: tuple[str, ...]
    env: Mapping[str, str | None]
    phases: tuple[str, ...] = ("train", "infer")
    networks: tuple[str, ...] = NETWORKS
    dtypes: tuple[str, ...] = DTYPES

    @property
    def name(self) -> str:
        """As in `--contenders` and in the results."""
        return f"{self.group}-{self.variant}" if self.variant else self.group


_TORCH_ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    # Compile in the worker itself: a pool of compiling processes would disturb the others.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
_KERAS_ENV = {
    "KERAS_BACKEND": "tensorflow",
    "CUDA_VISIBLE_DEVICES": "",
    "XLA_FLAGS": None,
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

MATMUL = "matmul"
REFERENCE = "textbook"

CONTENDERS = (
    Contender("ours", "step", ("jax", "flax"), JAX_ENV),
    Contender("ours", "loop", ("jax", "flax"), JAX_ENV, phases=("train",)),
    Contender("textbook", "", ("jax", "flax"), JAX_ENV),
    *(
        Contender("pytorch", f"{mode}-{layout}", ("torch",), _TORCH_ENV)
        for mode in ("eager", "compile")
        for layout in ("nchw", "nhwc")
    ),
    *(
        Contender(
            "keras",
            variant,
            ("keras", "tensorflow"),
            _KERAS_ENV,
            networks=("baseline", "net94"),
            dtypes=("float32",),
        )
        for variant in ("graph", "xla")
    ),
    *(
        Contender(MATMUL, variant, (variant,), JAX_ENV, dtypes=("float32",))
        for variant in ("jax", "numpy")
    ),
)
GROUPS = tuple(dict.fromkeys(contender.group for contender in CONTENDERS))


def choose(names: Iterable[str]) -> list[Contender]:
    """The contenders of these names and groups.

    Raises:
      UserError: a name is unknown, or a package is not installed.
    """
    chosen = []
    for name in names:
        found = [contender for contender in CONTENDERS if name in (contender.name, contender.group)]
        if not found:
            known = ", ".join(GROUPS)
            raise UserError(f"unknown contender {name!r}; known: {known}, and their variants")
        chosen += [contender for contender in found if contender not in chosen]
    packages = dict.fromkeys(package for one in chosen for package in one.requires)
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise UserError(
            f"not installed: {', '.join(absent)}; pip install -e '.[bench]' installs the peers, "
            f"--contenders chooses others"
        )
    return chosen
