"""Lower learning rates where the training loss no longer falls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from optax import contrib

from cnn.ops.partial_grad import PartialOptimizer


@functools.lru_cache(maxsize=64)  # `jit` compiles anew for another object
def reduce_on_plateau(
    tx: optax.GradientTransformation,
    *,
    steps_per_epoch: int,
    patience: int,
    factor: float,
    min_scale: float,
) -> optax.GradientTransformation:
    """An optimizer whose updates are scaled down after epochs without improvement.

    As Keras's `ReduceLROnPlateau` and PyTorch's, but on the mean training loss of the epoch, which
    each step passes to the optimizer as `value`: so all of its state is that of the optimizer, and
    is saved and restored with it. An epoch improves if its loss is lower than the best one by more
    than a ten-thousandth. A new scale holds from the last step of an epoch on. Steps that are
    skipped count for no epoch.

    Args:
      tx: the optimizer, with a schedule of its own and gradient accumulation, if any.
      steps_per_epoch: steps, not updates.
      patience: epochs in a row without improvement after which the scale falls, 1 or more.
      factor: the scale falls to this times itself, between 0 and 1.
      min_scale: the lowest scale, of 1 at the beginning.
    """
    plateau = contrib.reduce_on_plateau(
        factor, patience, accumulation_size=steps_per_epoch, min_scale=min_scale
    )
    chained = optax.chain(tx, plateau)
    return PartialOptimizer(*chained, tx.unused) if isinstance(tx, PartialOptimizer) else chained


def plateau_scale(opt_state: Any) -> float:
    """What `reduce_on_plateau` multiplies the learning rate by; 1 for other optimizers.

    Args:
      opt_state: the optimizer's state.
    """

    def is_plateau(node: Any) -> bool:
        return isinstance(node, contrib.ReduceLROnPlateauState)

    nodes = filter(is_plateau, jax.tree.leaves(opt_state, is_leaf=is_plateau))
    return next((float(node.scale) for node in nodes), 1.0)
