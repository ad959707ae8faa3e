"""Loss and accuracy as sums and counts, so that batches of any size merge exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cnn.errors import UserError


class Metrics(struct.PyTreeNode):
    """What a set of scored images adds up to.

    On the device the leaves are scalars (`float32[]`, `int32[]`, `int32[]`), or carry the
    leading axes that `vmap` or `scan` gave them. `total` brings them to the host, where
    Python numbers hold the sums of a whole run without rounding the counts.

    Attributes:
      loss_sum: sum of the per-example losses, in nats.
      correct: number of images whose largest logit is the label's.
      count: number of images scored.
    """

    loss_sum: jax.Array | float
    correct: jax.Array | int
    count: jax.Array | int

    @classmethod
    def of(
        cls,
        losses: jax.Array,
        logits: jax.Array,
        labels: jax.Array,
        mask: jax.Array | None = None,
    ) -> Metrics:
        """Scores one batch.

        Args:
          losses: `float[B]`, per example; they are summed as float32.
          logits: `float[B, K]`. The first of equal largest logits is the prediction.
          labels: `int[B]`.
          mask: `bool[B]`; examples where it is false count nowhere. All count without it.

        Raises:
          UserError: if an argument has another shape or type; nothing is broadcast.
        """
        _check_shapes(losses, logits, labels, mask)
        losses = losses.astype(jnp.float32)
        hits = jnp.argmax(logits, axis=-1) == labels
        if mask is None:
            mask = jnp.ones(labels.shape, bool)
        return cls(
            loss_sum=jnp.sum(jnp.where(mask, losses, 0.0)),
            # Exact up to 2**24 images. As float32 it joins the sum over devices of the losses and
            # gradients; by itself it would be a second rendezvous, a twentieth of a CPU's step.
            correct=jnp.sum(hits & mask, dtype=jnp.float32).astype(jnp.int32),
            count=jnp.sum(mask, dtype=jnp.int32),
        )

    @property
    def loss(self) -> jax.Array | float:
        """Mean loss per image, in nats."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> jax.Array | float:
        """Fraction of images predicted right, 0 to 1."""
        return self.correct / self.count


def _check_shapes(losses: Any, logits: Any, labels: Any, mask: Any) -> None:
    check_labels(labels)
    size = labels.shape[0]
    check_logits(logits, size)
    if not _is_float(losses) or losses.shape != (size,):
        raise UserError(
            f"the loss must return a float for each image, [B] with B={size}, not {shown(losses)}; "
            f"leave out its mean or sum over the batch"
        )
    is_bool = getattr(mask, "dtype", None) == np.dtype(bool)
    if mask is not None and not (is_bool and mask.shape == (size,)):
        raise UserError(f"mask must be bool [B] with B={size}, not {shown(mask)}")


def check_logits(logits: Any, batch_size: Any) -> None:
    """Raises UserError unless logits are floats `[B, K]`."""
    fits = _is_float(logits) and logits.ndim == 2 and logits.shape[0] == batch_size
    if not fits or not logits.shape[1]:
        raise UserError(
            f"the model must return logits, float [B, K] with B={batch_size}, not {shown(logits)}"
        )


def _is_float(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def check_labels(labels: Any) -> None:
    """Raises UserError unless labels are integers `[B]`."""
    is_integer = hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)
    if not is_integer or labels.ndim != 1:
        raise UserError(f"labels must be integers [B], one for each image, not {shown(labels)}")


def shown(value: Any) -> str:
    """Type and shape of an array, for a message; the type alone of anything else.

    >>> shown(np.zeros((2, 3), np.float32)), shown(None)
    ('float32[2, 3]', 'NoneType')
    """
    is_array = hasattr(value, "dtype")
    return f"{value.dtype}{list(value.shape)}" if is_array else type(value).__name__


def total(parts: Iterable[Metrics]) -> Metrics:
    """Adds metrics up on the host: Python integers, and the losses in float64.

    Waits for the device values it is given. Leaves with leading axes (from `scan`) are
    summed over them in order.
    """
    host = [jax.tree.map(np.ravel, part) for part in jax.device_get(list(parts))]
    return Metrics(
        # Left to right: a run cut into other pieces adds up to the same bits.
        loss_sum=sum((float(x) for part in host for x in part.loss_sum), 0.0),
        correct=sum(int(part.correct.sum()) for part in host),
        count=sum(int(part.count.sum()) for part in host),
    )


class MetricsAccumulator:
    """The metrics of an epoch's steps: on the devices until somebody asks.

    Args:
      step: steps done before those to be added.
      metrics: of the epoch's steps among them, on the host; none without it.

    Attributes:
      metrics: of the steps that were collected, on the host.
      skipped: which of these steps were not finite and count nowhere, counted from 1.
      pending: what was added and not collected, in order.
    """

    def __init__(self, step: int, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics(loss_sum=0.0, correct=0, count=0)
        self.skipped: list[int] = []
        self._step = step
        self.pending: list[tuple[Metrics, int]] = []

    def add(self, scores: Metrics, steps: int) -> None:
        """Takes the metrics of some steps: leaves `[steps]` or longer, or scalars of one step."""
        self.pending.append((scores, steps))

    def collect(self, keep: int = 0) -> Metrics:
        """Fetches what was added, which waits for it, and gives the sum over the epoch so far.

        Args:
          keep: leave so many of the newest: the devices go on while the host reads.
        """
        ready = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(ready) :]
        host = jax.device_get([scores for scores, _ in ready])
        for scores, (_, steps) in zip(host, ready, strict=True):
            empty = np.flatnonzero(np.ravel(scores.count)[:steps] == 0)
            self.skipped += (self._step + 1 + empty).tolist()
            self._step += steps
        self.metrics = total([self.metrics, *host])
        return self.metrics
