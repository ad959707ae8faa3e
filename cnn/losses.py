"""Training losses: functions of `(logits float[B, K], labels int[B])` that return `float32[B]`.

A loss is a value, not a closure: equal settings compare equal, so `jit` does not compile twice. A
row of `LOSSES` makes it known to configs; its fields are those of its dataclass. `per_example`
declares that the loss of an image depends on no other image of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from cnn.errors import UserError
from cnn.registry import Schema, complete, schema, select

LossFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with integer labels, in nats.

    With smoothing s over K classes the target is (1 - s) * onehot + s / K (Szegedy et al. 2016,
    "Rethinking the Inception Architecture", section 7).

    Raises:
      UserError: the smoothing does not lie in [0, 1).

    >>> CrossEntropy()(jnp.zeros((2, 10)), jnp.array([3, 7]))  # log(10)
    Array([2.3025851, 2.3025851], dtype=float32)
    """

    label_smoothing: float = 0.0
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"loss.label_smoothing={self.label_smoothing} must be at least 0 and below 1"
            )

    @property
    def for_evaluation(self) -> CrossEntropy:
        """Without smoothing, which belongs to the training objective only."""
        return CrossEntropy()

    def __call__(
        self, logits: Float[Array, "B K"], labels: Integer[Array, " B"]
    ) -> Float[Array, " B"]:
        """A label outside 0..K-1 gives NaN."""
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return _nan_unless_class(losses, labels, logits.shape[-1])


def _nan_unless_class(losses: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    # Indexing would take a negative label for a class counted from the end. The number of classes
    # may exceed what a short integer type of labels holds.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return jnp.where((wide >= 0) & (wide < num_classes), losses, jnp.nan)


LOSSES: dict[str, Callable[..., LossFn]] = {"cross_entropy": CrossEntropy}


def loss_schema(name: str) -> Schema:
    """The fields of a loss; raises UserError for an unknown name."""
    return schema(select("loss", LOSSES, name))


def create_loss(name: str, **fields: Any) -> LossFn:
    """Builds a loss by its config name.

    Raises:
      UserError: an unknown name or field, or a value that the loss refuses.

    >>> create_loss("cross_entropy", label_smoothing=0.1)
    CrossEntropy(label_smoothing=0.1)
    """
    return LOSSES[name](**complete("loss", loss_schema(name), fields))


def evaluation_loss(loss_fn: LossFn) -> LossFn:
    """The loss that the test images are scored with: `for_evaluation` where a loss has that."""
    return getattr(loss_fn, "for_evaluation", loss_fn)
