"""A trained model as one function of uint8 images, and that function as a StableHLO file."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cnn.data.pipeline import normalize
from cnn.inference import TrainedModel
from cnn.ops.microbatch import is_per_example
from cnn.steps import predict_step

PLATFORMS = ("cpu", "cuda", "tpu")
# Pixel values that a CPU computes at a time: 64 images of CIFAR-10. The whole batch at once takes
# up to four times as long, as its patches do not stay in the cache.
_VALUES_PER_PART = 64 * 32 * 32 * 3


def stablehlo(run: TrainedModel) -> bytes:
    """The model as `jax.export` serializes it: `uint8[B, H, W, C]` -> logits `float32[B, K]`.

    The weights and the normalization are inside. B is free, and the file has a program for each of
    `PLATFORMS`. `jax.export.deserialize(data).call(images)` runs it.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *run.image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(_program(run)), platforms=PLATFORMS)(image)
    return bytes(exported.serialize())


def _program(run: TrainedModel) -> Callable[[jax.Array], jax.Array]:
    # On the host, as the file is for one device. Prediction needs no random key.
    state = jax.device_get(run.state.replace(key=()))
    mean, std = run.normalization
    size = max(_VALUES_PER_PART // math.prod(run.image_shape), 1)

    def logits(images: jax.Array) -> jax.Array:
        return predict_step(state, normalize(images, mean, std))

    def in_parts(images: jax.Array) -> jax.Array:
        """Parts of a fixed size one after the other, then the images that remain."""
        num_parts = images.shape[0] // size
        # Longer by one part, as a slice must fit into an array of any B.
        longer = jnp.concatenate([images, jnp.zeros((size, *run.image_shape), jnp.uint8)])
        known = jnp.zeros((longer.shape[0], len(run.class_names)), jnp.float32)

        def add(index: jax.Array, known: jax.Array) -> jax.Array:
            part = logits(lax.dynamic_slice_in_dim(longer, index * size, size))
            return lax.dynamic_update_slice_in_dim(known, part, index * size, 0)

        known = lax.fori_loop(0, jnp.asarray(num_parts, jnp.int32), add, known)
        done = num_parts * size
        return jnp.concatenate([known[:done], logits(images[done:])])

    if not is_per_example(run.model):
        return logits
    return lambda images: lax.platform_dependent(images, cpu=in_parts, default=logits)
