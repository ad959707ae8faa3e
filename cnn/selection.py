"""Training on a part of each batch, which a small proxy network chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from cnn.arrays import AnyArray
from cnn.errors import UserError
from cnn.losses import CrossEntropy, LossFn
from cnn.ops import optax_update
from cnn.ops.linen_apply import as_before
from cnn.steps import Batch, TrainState, create_train_state, forward_losses


@dataclasses.dataclass(frozen=True)
class HardestImages:
    """Keeps the images of a batch with the largest losses of a proxy network.

    The proxy is trained on the images that it chooses, at every `update_every`-th step; in between
    it only follows the batches with its running statistics. So the network that is trained sees
    fewer images, and the proxy costs little (KellerJordan/cifar10-airbench, airbench96_faster.py,
    which trains the proxy first and replays its choice; here both train side by side, which is the
    same, as the proxy does not depend on the network). The images keep their order.

    With `select` a script trains as a run does:

        selection, proxy = hardest_images(SpeedNet(10, widths=(32, 64, 64)), tx, key, (32, 32, 3),
                                          keep=512)
        state = state.replace(selection=selection, proxy=proxy)

    Attributes:
      apply_fn: of the proxy.
      tx: its optimizer, whose schedule counts its updates.
      loss_fn: ranks the images, and is the proxy's objective.
      keep: how many images of a batch are kept.
      update_every: steps between two updates of the proxy.
    """

    apply_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    loss_fn: LossFn
    keep: int
    update_every: int = 4

    def __call__(
        self, proxy: Any, batch: Batch, step: AnyArray, key: AnyArray
    ) -> tuple[Any, Batch]:
        """The proxy after a step, and the batch of the `keep` images with the largest losses.

        Args:
          proxy: `params`, `model_state` and `opt_state`.
          batch: arrays `[B, ...]`.
          step: `int32[]`, the steps made before.
          key: of the proxy's random streams, if it has any.

        Raises:
          UserError: the batch has fewer images.
        """
        size = batch["label"].shape[0]
        if size < self.keep:
            raise UserError(f"proxy.keep={self.keep} is more than the {size} images of a batch")
        state = TrainState(
            step=step, key=key, apply_fn=self.apply_fn, tx=self.tx, loss_fn=self.loss_fn, **proxy
        )
        divisor = self.keep if getattr(self.loss_fn, "reduction", "mean") == "mean" else 1

        def losses_of(params: Any) -> tuple[jax.Array, Any]:
            losses, _, model_state = forward_losses(state, params, batch)
            return losses.astype(jnp.float32), model_state

        def with_update(proxy: Any) -> tuple[Any, Batch]:
            losses, gradient, model_state = jax.vjp(losses_of, proxy["params"], has_aux=True)
            index = self._hardest(losses)
            kept = jnp.zeros(size).at[index].set(1 / divisor)
            (grads,) = gradient(kept)
            updates, opt_state = optax_update.update(
                self.tx,
                grads,
                proxy["opt_state"],
                proxy["params"],
                jnp.vdot(losses, kept),
                lambda params: jnp.vdot(losses_of(params)[0], kept),
            )
            proxy = {
                "params": optax.apply_updates(proxy["params"], updates),
                "model_state": model_state,
                "opt_state": as_before(opt_state, proxy["opt_state"]),
            }
            return proxy, _rows(batch, index)

        def without(proxy: Any) -> tuple[Any, Batch]:
            losses, model_state = losses_of(proxy["params"])
            return {**proxy, "model_state": model_state}, _rows(batch, self._hardest(losses))

        # The rows are taken within the branches: outside, two CPU devices may begin with different
        # ones of the branch and of the exchange of images, and wait for each other for ever.
        return jax.lax.cond(step % self.update_every == 0, with_update, without, proxy)

    def _hardest(self, losses: jax.Array) -> jax.Array:
        """The places of the largest losses, in order; of equal ones the first."""
        return jnp.sort(jax.lax.top_k(losses, self.keep)[1])


def _rows(batch: Batch, index: jax.Array) -> Batch:
    """Some rows of a batch, sharded over the devices of the current mesh, if any."""
    rows = {name: jnp.asarray(array)[index] for name, array in batch.items()}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or index.shape[0] % mesh.size:
        return rows
    # Without it each device would train on all of them.
    return jax.lax.with_sharding_constraint(rows, PartitionSpec(mesh.axis_names))


def hardest_images(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: AnyArray,
    image_shape: tuple[int, int, int],
    *,
    keep: int,
    update_every: int = 4,
    loss_fn: LossFn = CrossEntropy(),
) -> tuple[HardestImages, dict[str, Any]]:
    """A selection by a fresh proxy, and the proxy: `selection` and `proxy` of a `TrainState`.

    Args:
      model: the proxy, as for `create_train_state`.
      tx: its optimizer.
      key: from `jax.random.key(seed)`.
      image_shape: (H, W, C).
      keep: see `HardestImages`, as for the arguments that follow.
      update_every: see there.
      loss_fn: see there.

    Raises:
      UserError: as for `create_train_state`; or `keep` or `update_every` is less than 1.
    """
    for name, value in (("keep", keep), ("update_every", update_every)):
        if value < 1:
            raise UserError(f"proxy.{name}={value} must be 1 or more")
    state = create_train_state(model, tx, key, image_shape, loss_fn=loss_fn)
    selection = HardestImages(state.apply_fn, state.tx, state.loss_fn, keep, update_every)
    kept = ("params", "model_state", "opt_state")
    return selection, {name: getattr(state, name) for name in kept}
