"""Training losses: functions of `(logits float[B, K], labels int[B])` that return `float32[B]`.

A loss is a value, not a closure: equal settings compare equal, so `jit` does not compile twice. A
row of `LOSSES` makes it known to configs; its fields are those of its dataclass. `per_example`
declares that the loss of an image depends on no other image of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from cnn.arrays import AnyArray
from cnn.errors import UserError
from cnn.registry import Schema, complete, schema, select

LossFn = Callable[[Any, Any], jax.Array]
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loss:
    """What all losses here have in common.

    Attributes:
      reduction: how `train_step` makes one number of the losses of a batch: "mean" or "sum". With
        "sum" the gradients grow with the batch. Metrics report the mean in either case.
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise UserError(
                f"loss.reduction={self.reduction!r} must be one of {', '.join(REDUCTIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class CrossEntropy(_Loss):
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
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"loss.label_smoothing={self.label_smoothing} must be at least 0 and below 1"
            )

    @property
    def for_evaluation(self) -> CrossEntropy:
        """Without smoothing, which belongs to the training objective only."""
        return CrossEntropy()

    def __call__(
        self, logits: Float[AnyArray, "B K"], labels: Integer[AnyArray, " B"]
    ) -> Float[Array, " B"]:
        """A label outside 0..K-1 gives NaN."""
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return _nan_unless_class(losses, labels, logits.shape[-1])


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy(_Loss):
    """Binary cross-entropy of each class against all others, summed over the classes, in nats.

    The targets are one-hot; each logit is a sigmoid's (Wightman et al. 2021, "ResNet strikes back",
    section 2, who take the mean over the classes; the sum is K times that).

    >>> SigmoidCrossEntropy()(jnp.zeros((1, 10)), jnp.array([3]))  # 10 log(2)
    Array([6.931472], dtype=float32)
    """

    per_example: ClassVar[bool] = True

    def probabilities(self, logits: Float[AnyArray, "B K"]) -> Float[Array, "B K"]:
        """The sigmoid of each logit: these do not add up to 1."""
        return jax.nn.sigmoid(logits)

    def __call__(
        self, logits: Float[AnyArray, "B K"], labels: Integer[AnyArray, " B"]
    ) -> Float[Array, " B"]:
        """A label outside 0..K-1 gives NaN."""
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
        return _nan_unless_class(losses, labels, logits.shape[-1])


@dataclasses.dataclass(frozen=True)
class FocalLoss(_Loss):
    """-(1 - p)**gamma * log(p) for the probability p of the label's class, in nats.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4, with a softmax. It gives less
    weight to images that are classified well; with gamma 0 it is cross-entropy.

    Raises:
      UserError: gamma is negative or not finite.

    >>> FocalLoss(gamma=2.0)(jnp.zeros((1, 2)), jnp.array([0]))  # log(2) / 4
    Array([0.1732868], dtype=float32)
    """

    gamma: float = 2.0
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"loss.gamma={self.gamma} must be 0 or more, and finite")

    def __call__(
        self, logits: Float[AnyArray, "B K"], labels: Integer[AnyArray, " B"]
    ) -> Float[Array, " B"]:
        """A label outside 0..K-1 gives NaN."""
        losses = CrossEntropy()(logits, labels)
        if self.gamma == 0:
            return losses
        # 1 - p without cancellation. Below 1 the derivative of a power is infinite at 0.
        wrong = jnp.maximum(-jnp.expm1(-losses), jnp.finfo(jnp.float32).tiny)
        return wrong**self.gamma * losses


def _nan_unless_class(losses: AnyArray, labels: AnyArray, num_classes: int) -> jax.Array:
    # Indexing would take a negative label for a class counted from the end. The number of classes
    # may exceed what a short integer type of labels holds.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return jnp.where((wide >= 0) & (wide < num_classes), losses, jnp.nan)


LOSSES: dict[str, Callable[..., LossFn]] = {
    "cross_entropy": CrossEntropy,
    "focal": FocalLoss,
    "sigmoid_cross_entropy": SigmoidCrossEntropy,
}


def loss_schema(name: str) -> Schema:
    """The fields of a loss; raises UserError for an unknown name."""
    return schema(select("loss", LOSSES, name))


def create_loss(name: str, **fields: Any) -> LossFn:
    """Builds a loss by its config name.

    Raises:
      UserError: an unknown name or field, or a value that the loss refuses.

    >>> create_loss("cross_entropy", label_smoothing=0.1)
    CrossEntropy(reduction='mean', label_smoothing=0.1)
    """
    fields = complete("loss", loss_schema(name), fields)
    return LOSSES[name](**fields)


def reduction_of(loss_fn: LossFn) -> str:
    """How the losses of a batch become one number: "mean" unless a loss declares "sum".

    Raises:
      UserError: it declares something else.
    """
    reduction = getattr(loss_fn, "reduction", "mean")
    if reduction not in REDUCTIONS:
        raise UserError(
            f"the reduction of a loss must be one of {', '.join(REDUCTIONS)}, not {reduction!r}"
        )
    return reduction


def evaluation_loss(loss_fn: LossFn) -> LossFn:
    """The loss that the test images are scored with: `for_evaluation` where a loss has that."""
    return getattr(loss_fn, "for_evaluation", loss_fn)


def probabilities(loss_fn: LossFn, logits: Float[AnyArray, "B K"]) -> Float[Array, "B K"]:
    """The probabilities of the classes: the softmax, or `loss_fn.probabilities` if it has that."""
    return getattr(loss_fn, "probabilities", jax.nn.softmax)(logits)
