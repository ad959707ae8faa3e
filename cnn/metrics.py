"""Loss and accuracy as sums and counts, so that batches of any size merge exactly."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


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
          losses: `float32[B]`, per example.
          logits: `[B, num_classes]`. The first of equal largest logits is the prediction.
          labels: `int32[B]`.
          mask: `bool[B]`; examples where it is false count nowhere. All count without it.
        """
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


class Tally:
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
