"""Metrics as named sums and a count, so that batches of any size merge exactly.

A metric is a function of `(logits float32[B, K], labels int[B])` that gives one number for each
image; the mean over images is what is reported. A row of `METRICS` makes it known to configs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Integer

from cnn.arrays import AnyArray
from cnn.errors import UserError, array_type
from cnn.registry import select

MetricFn = Callable[[Any, Any], jax.Array]


def accuracy(logits: Float[AnyArray, "B K"], labels: Integer[AnyArray, " B"]) -> Bool[Array, " B"]:
    """Whether the largest logit is the label's; the first of equal ones counts as the largest."""
    return jnp.argmax(logits, axis=-1) == labels


def top5_accuracy(
    logits: Float[AnyArray, "B K"], labels: Integer[AnyArray, " B"]
) -> Bool[Array, " B"]:
    """Whether at most four logits are larger than the label's."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="fill", fill_value=jnp.nan)
    is_class = jnp.asarray(labels >= 0) & ~jnp.isnan(own[:, 0])
    return is_class & (jnp.sum(logits > own, axis=-1) < 5)


METRICS: dict[str, MetricFn] = {fn.__name__: fn for fn in (accuracy, top5_accuracy)}


def find_metrics(names: Iterable[str]) -> tuple[MetricFn, ...]:
    """The metrics of some names.

    Raises:
      UserError: there is no such metric.
    """
    return tuple(select("metric", METRICS, name) for name in names)


def metric_names(metric_fns: Iterable[MetricFn]) -> list[str]:
    """The names of some metrics, those of their functions.

    Raises:
      UserError: a function has no name, or one that is taken.
    """
    names = [getattr(fn, "__name__", "") for fn in metric_fns]
    for name in names:
        if not name.isidentifier() or names.count(name) > 1 or name in ("loss", "count"):
            raise UserError(
                f"metrics need names of their own, those of their functions; {name!r} is not one"
            )
    return names


class Metrics(struct.PyTreeNode):
    """What a set of scored images adds up to.

    On the device the leaves are scalars, or carry the leading axes that `vmap` or `scan` gave them.
    `merge` brings them to the host, where Python numbers hold the sums of a whole run.

    Attributes:
      sums: `float32[]` by name: "loss", and one for each metric.
      count: `int32[]`, the number of images scored.

    >>> metrics = Metrics(sums={"loss": 6.0, "accuracy": 1.0}, count=4)
    >>> metrics.loss, metrics.accuracy, metrics.means()
    (1.5, 0.25, {'loss': 1.5, 'accuracy': 0.25})
    """

    sums: Mapping[str, Any]
    count: Any

    @classmethod
    def from_logits(
        cls,
        losses: Any,
        logits: Any,
        labels: Any,
        mask: Any = None,
        *,
        metric_fns: tuple[MetricFn, ...] = (accuracy,),
    ) -> Metrics:
        """Scores one batch.

        Args:
          losses: `float[B]`; they are summed as float32.
          logits: `float[B, K]`.
          labels: `int[B]`.
          mask: `bool[B]`; images where it is false count nowhere. All count without it.
          metric_fns: named by their `__name__`.

        Raises:
          UserError: if an argument has another shape or dtype; nothing is broadcast.
        """
        _check_shapes(losses, logits, labels, mask)
        names = metric_names(metric_fns)
        values = {"loss": losses}
        values |= {name: fn(logits, labels) for name, fn in zip(names, metric_fns, strict=True)}
        for name, value in values.items():
            if getattr(value, "shape", None) != labels.shape:
                raise UserError(
                    f"the metric {name} must return a number for each image, [B] with "
                    f"B={labels.shape[0]}, not {array_type(value)}"
                )
        if mask is None:
            mask = jnp.ones(labels.shape, bool)
        # As float32, exact up to 2**24, the sums join the one all-reduce of the gradients; integers
        # would need a second one, a twentieth of a step on a CPU.
        sums = {
            name: jnp.sum(jnp.where(mask, value.astype(jnp.float32), 0.0))
            for name, value in values.items()
        }
        return cls(sums=sums, count=jnp.sum(mask, dtype=jnp.int32))

    @classmethod
    def merge(cls, parts: Iterable[Metrics]) -> Metrics:
        """Adds metrics up on the host, in float64. Waits for the device values.

        Leaves with leading axes (from `scan`) are summed over them in order.
        """
        host = [jax.tree.map(np.ravel, part) for part in jax.device_get(list(parts))]
        names = dict.fromkeys(name for part in host for name in part.sums)
        return cls(
            # Left to right: a run that is cut into other pieces adds up to the same bits.
            sums={
                name: sum((float(x) for part in host for x in part.sums.get(name, ())), 0.0)
                for name in names
            },
            count=sum(int(part.count.sum()) for part in host),
        )

    @classmethod
    def unstack(cls, metrics: Metrics) -> list[Metrics]:
        """Metrics on the host for each entry of a leading axis."""
        host = jax.device_get(metrics)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(len(host.count))]

    def means(self) -> dict[str, Any]:
        """The mean over images by name: the loss in its unit, accuracies as fractions."""
        names = sorted(self.sums, key=lambda name: name != "loss")  # the loss first
        return {name: self.sums[name] / self.count for name in names}

    @property
    def loss(self) -> Any:
        """Mean loss per image, in the unit of the loss."""
        return self.sums["loss"] / self.count

    @property
    def accuracy(self) -> Any:
        """Fraction of images that are classified correctly."""
        return self.sums["accuracy"] / self.count


def _check_shapes(losses: Any, logits: Any, labels: Any, mask: Any) -> None:
    check_labels(labels)
    size = labels.shape[0]
    check_logits(logits, size)
    if not _is_float(losses) or losses.shape != (size,):
        raise UserError(
            f"the loss must return a float for each image, [B] with B={size}, not "
            f"{array_type(losses)}; leave out its mean or sum over the batch"
        )
    is_bool = getattr(mask, "dtype", None) == np.dtype(bool)
    if mask is not None and not (is_bool and mask.shape == (size,)):
        raise UserError(f"mask must be bool [B] with B={size}, not {array_type(mask)}")


def check_logits(logits: Any, batch_size: Any) -> None:
    """Raises UserError unless logits are floats `[B, K]`."""
    fits = _is_float(logits) and logits.ndim == 2 and logits.shape[0] == batch_size
    if not fits or not logits.shape[1]:
        raise UserError(
            f"the model must return logits, float [B, K] with B={batch_size}, not "
            f"{array_type(logits)}"
        )


def _is_float(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def check_labels(labels: Any) -> None:
    """Raises UserError unless labels are integers `[B]`."""
    is_integer = hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)
    if not is_integer or labels.ndim != 1:
        raise UserError(
            f"labels must be integers [B], one for each image, not {array_type(labels)}"
        )


class MetricsAccumulator:
    """The metrics of an epoch's steps, which stay on the devices until they are fetched.

    Args:
      step: the number of steps made before the first that is added.
      metrics: the sums over earlier steps of this epoch, on the host; None without any.

    Attributes:
      metrics: of the steps that were fetched, on the host.
      skipped: step numbers, from 1, of those whose loss or gradients were not finite.
      pending: what was added and not fetched, in order.
    """

    def __init__(self, step: int, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics(sums={}, count=0)
        self.skipped: list[int] = []
        self._step = step
        self.pending: list[tuple[Metrics, int]] = []

    def add(self, metrics: Metrics, num_steps: int) -> None:
        """Takes the metrics of some steps: leaves `[num_steps]` or longer, or scalars of one."""
        self.pending.append((metrics, num_steps))

    def fetch(self, keep_newest: int = 0) -> Metrics:
        """Waits for what was added and returns the sums over the epoch so far.

        Args:
          keep_newest: how many of the newest stay on the devices, which compute them meanwhile.
        """
        ready = self.pending[: len(self.pending) - keep_newest]
        self.pending = self.pending[len(ready) :]
        host = jax.device_get([metrics for metrics, _ in ready])
        for metrics, (_, num_steps) in zip(host, ready, strict=True):
            empty = np.flatnonzero(np.ravel(metrics.count)[:num_steps] == 0)
            self.skipped += (self._step + 1 + empty).tolist()
            self._step += num_steps
        self.metrics = Metrics.merge([self.metrics, *host])
        return self.metrics


def wilson_interval(correct: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, "Probable inference").

    It is that of one model on images drawn independently; other random seeds vary beyond it.

    Args:
      correct: the number of images that were classified correctly.
      count: the number of images that were tested, at least 1.
      level: the confidence, between 0 and 1.

    Returns:
      The lower and the upper end, fractions from 0 to 1.

    >>> low, high = wilson_interval(6957, 10_000)
    >>> round(low, 4), round(high, 4)
    (0.6866, 0.7046)
    """
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    fraction = correct / count
    centre = fraction + z**2 / (2 * count)
    radius = z * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return max((centre - radius) / scale, 0.0), min((centre + radius) / scale, 1.0)
