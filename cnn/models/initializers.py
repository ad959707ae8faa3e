"""Initial parameters that are more than independent random numbers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.arrays import AnyArray

Initializer = nn.initializers.Initializer

# Uniform in +-1 / sqrt(fan_in), PyTorch's default of convolutions and linear layers.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def identity_first(others: Initializer) -> Initializer:
    """The first C output channels of a convolution repeat its C input channels ("dirac" filters).

    Zagoruyko & Komodakis 2017, "DiracNets"; partial, as in Jordan 2024, arXiv:2404.00498, section
    3.3. Of a kernel `[kh, kw, C, K]` with K < C the first K channels are repeated.

    Args:
      others: initializes the whole kernel, of which the output channels from C on remain.
    """

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        kernel = others(key, shape, dtype)
        height, width, channels, features = shape
        count = min(channels, features)
        kernel = kernel.at[..., :count].set(0)
        same = jnp.arange(count)
        return kernel.at[height // 2, width // 2, same, same].set(1)

    return init


def unit_std(like: Initializer) -> Initializer:
    """Scales what another initializer draws to a standard deviation of exactly 1 (with n - 1)."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        drawn = like(key, shape, dtype)
        return drawn / drawn.std(ddof=1)

    return init


def whitening_kernel(images: AnyArray, size: int = 2, epsilon: float = 5e-4) -> jax.Array:
    """Filters that decorrelate the patches of images, and their negatives.

    Of the flattened patches p (stride 1) the second moment E[p p^T] has eigenvectors v and
    eigenvalues l; the filters are v / sqrt(l + epsilon), by falling eigenvalue, and then the same
    with the opposite sign. Page 2019, "How to Train Your ResNet 8", with the uncentred moment of
    Jordan 2024, arXiv:2404.00498, section 3.2. The sign of an eigenvector is arbitrary.

    Args:
      images: normalized, `float32[N, H, W, C]`.
      size: height and width of a patch, in pixels.
      epsilon: keeps directions without variance from becoming noise.

    Returns:
      `float32[size, size, C, 2 * size * size * C]`.
    """
    images = jnp.asarray(images, jnp.float32)
    height, width, channels = (
        images.shape[1] - size + 1,
        images.shape[2] - size + 1,
        images.shape[3],
    )
    views = [images[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    patches = jnp.concatenate(views, axis=-1).reshape(-1, size * size * channels)
    moment = jnp.matmul(patches.T, patches, precision="highest") / patches.shape[0]
    values, vectors = jnp.linalg.eigh(moment)  # ascending; an eigenvector is a column
    filters = (vectors / jnp.sqrt(values + epsilon)[None, :])[:, ::-1]
    return jnp.concatenate([filters, -filters], axis=1).reshape(size, size, channels, -1)
