"""A network that learns in one epoch: a cosine transform of patches in front of a small CNN."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn.errors import UserError
from cnn.models.checks import check_blocks, check_fields, check_image_rank
from cnn.models.conv_pool import ConvPool
from cnn.ops import convolution

_KERNEL_INIT = nn.initializers.glorot_uniform()


class DctCNN(nn.Module):
    """A whitened cosine transform of patches, then convolutions with pooling and dense layers.

    The stem has no trained parameters: the cosine transform of each patch, normalized by batch
    statistics, then relu of both signs. The transform nearly decorrelates the pixels of natural
    images (Ahmed et al. 1974, "Discrete cosine transform"), so the stem's output is nearly
    whitened, at a fraction of the resolution.

    Attributes:
      num_classes: number of logits.
      patch_size: height and width of a patch, in pixels.
      patch_features: number of coefficients that are kept of each patch, by rising frequency.
      features: output channels of each block of convolution, 2x2 max pooling and relu.
      kernel_size: height and width of the convolution kernels.
      padding: "VALID" shrinks the image at each convolution, "SAME" does not; in any case.
      hidden_features: width of the first dense layer; 0 leaves it out.
      batch_norm: whether convolutions and the first dense layer are followed by batch normalization
        (Ioffe & Szegedy 2015) with a trained bias and no trained scale.
      dtype: of the computation; parameters and logits are float32.
      conv_implementation: one of `cnn.ops.convolution.IMPLEMENTATIONS`. With an optimizer that uses
        the sign of the gradient choose "patches": "auto" may round gradients that are exactly zero.
    """

    num_classes: int
    patch_size: int = 4
    patch_features: int = 24
    features: Sequence[int] = (64,)
    kernel_size: int = 3
    padding: str = "VALID"
    hidden_features: int = 64
    batch_norm: bool = True
    dtype: Any = jnp.float32
    conv_implementation: str = "auto"
    # The logits of an image depend on other images by batch statistics in training only.
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.padding = str(self.padding).upper()
        check_fields(self, patch_size=1, patch_features=1, features=1, kernel_size=1)
        check_fields(self, hidden_features=0)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Normalized images `float[B, H, W, C]` -> logits `float32[B, num_classes]`.

        With `train` the batch's own statistics normalize it and update `batch_stats`. Raises
        `UserError` if the images are too small for the patches or the blocks.
        """
        self._check_size(image.shape)
        # A weight of 0.1 per batch lets the running statistics follow runs of few steps.
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, use_scale=False, dtype=self.dtype
        )
        x = self._cosine_transform(image.astype(self.dtype))
        x = norm(use_bias=False, name="patch_norm")(x)
        x = nn.relu(jnp.concatenate([x, -x], axis=-1))
        for block, features in enumerate(self.features):
            x = ConvPool(
                features,
                self.kernel_size,
                self.padding,
                use_bias=not self.batch_norm,
                kernel_init=_KERNEL_INIT,
                dtype=self.dtype,
                implementation=self.conv_implementation,
                name=f"Conv_{block}",
            )(x)
            x = nn.relu(norm()(x) if self.batch_norm else x)
        x = convolution.flatten(x)
        dense = functools.partial(nn.Dense, kernel_init=_KERNEL_INIT, dtype=self.dtype)
        if self.hidden_features:
            x = dense(
                self.hidden_features,
                use_bias=not self.batch_norm,
                dot_general=convolution.dot_general,
            )(x)
            x = nn.relu(norm()(x) if self.batch_norm else x)
        return dense(self.num_classes)(x).astype(jnp.float32)

    def _cosine_transform(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H // patch_size, W // patch_size, patch_features]`."""
        filters = cosine_filters(self.patch_size, x.shape[-1], self.patch_features)
        return convolution.conv_general_dilated(
            x,
            jnp.asarray(filters, x.dtype),
            (self.patch_size, self.patch_size),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            implementation=self.conv_implementation,
        )

    def _check_size(self, shape: tuple[int, ...]) -> None:
        check_image_rank(self, shape)
        available = self.patch_size**2 * shape[3]
        if self.patch_features > available:
            raise UserError(
                f"model.patch_features={self.patch_features} is more than the {available} "
                f"values in a patch of {self.patch_size}x{self.patch_size}x{shape[3]}"
            )
        if self.patch_size > min(shape[1:3]):
            raise UserError(
                f"model.patch_size={self.patch_size} is more than the {min(shape[1:3])} pixels "
                f"of the images"
            )
        check_blocks(self, shape, self.patch_size)


def cosine_filters(size: int, channels: int, count: int) -> np.ndarray:
    """The discrete cosine transform of a patch, as a kernel `float32[size, size, C, count]`.

    The transform is orthonormal over rows, columns and channels; of red, green and blue it makes
    brightness and two colour differences. Filters are ordered by rising frequency, where the
    frequency over channels counts twice, since colour varies less than brightness in natural
    images; on CIFAR-10 the order is close to that of the principal components.

    >>> cosine_filters(2, 1, 2)[..., 0, 1]  # left against right
    array([[ 0.5, -0.5],
           [ 0.5, -0.5]], dtype=float32)
    """
    space, colour = _cosine_matrix(size), _cosine_matrix(channels)
    filters = np.einsum("ah,bw,cd->hwdabc", space, space, colour)
    row, column, channel = np.indices((size, size, channels)).reshape(3, -1)
    order = np.argsort(row + column + 2 * channel, kind="stable")[:count]
    return filters.reshape(size, size, channels, -1)[..., order].astype(np.float32)


def _cosine_matrix(size: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II), with a row for each frequency."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * frequency * (2 * position + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows
