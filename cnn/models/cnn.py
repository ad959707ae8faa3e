"""Networks: linen modules from images `[B, H, W, C]` to logits `[B, num_classes]`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn.errors import UserError
from cnn.ops import convolution

# Keras's default, which the seed was trained with; Flax's own is lecun_normal.
_KERNEL_INIT = nn.initializers.glorot_uniform()


class CNN(nn.Module):
    """Blocks of convolution, 2x2 max-pooling and relu, then two dense layers.

    With the defaults and 32x32x3 images this is the Keras tutorial network of the README:
    167,562 parameters for 10 classes.

    With `patch_size` a stem without parameters comes first: the cosine transform of each patch,
    batch-normalized, and then relu of both signs. The transform nearly decorrelates the pixels of
    natural images (Ahmed et al. 1974, "Discrete cosine transform"), so what comes out is nearly
    whitened, at a fraction of the resolution.

    Attributes:
      num_classes: number of logits.
      features: output channels of each block.
      kernel_size: height and width of the convolutions, in pixels.
      padding: "VALID" (no padding, as in the seed) or "SAME" (zeros keep the size), in any case.
      hidden_features: width of the first dense layer; 0 leaves it out.
      patch_size: height and width of the stem's patches, in pixels; 0 is no stem.
      patch_features: coefficients that the stem keeps of each patch, of low frequency first.
      batch_norm: normalize what each convolution and the first dense layer give, before the
        relu (Ioffe & Szegedy 2015); a trained bias, no trained scale.
      dtype: of the computation; parameters and logits stay float32.
      conv_implementation: how convolution and pooling are computed, one of `convolution.IMPLEMENTATIONS`.
        "winograd", which "auto" takes on a CPU for 3x3 kernels with more than 3 input channels,
        rounds to 1e-5 of the largest value, makes gradients that are exactly zero a rounding
        noise, and spreads NaN and infinity to neighbouring pixels. With an optimizer that uses the
        sign of the gradient (lion, signum, rprop) choose "patches".

    >>> model = CNN(num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> model.apply(variables, jnp.zeros((8, 32, 32, 3))).shape
    (8, 10)
    """

    num_classes: int
    features: Sequence[int] = (32, 64)
    kernel_size: int = 3
    padding: str = "VALID"
    hidden_features: int = 64
    patch_size: int = 0
    patch_features: int = 24
    batch_norm: bool = False
    dtype: Any = jnp.float32
    conv_implementation: str = "auto"
    # No image's logits depend on another image, but by batch statistics in training.
    per_example: ClassVar[bool] = True

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, H, W, C]` -> `float32[B, num_classes]`.

        Args:
          image: normalized.
          train: normalize by the batch, and update `batch_stats`; without a stem and
            `batch_norm` it changes nothing.

        Raises:
          UserError: if the image is too small for the blocks.
        """
        self._check_size(image.shape)
        # A tenth of each batch enters the running statistics: they follow runs of few steps.
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, use_scale=False, dtype=self.dtype
        )
        x = image.astype(self.dtype)
        if self.patch_size:
            x = norm(use_bias=False, name="patch_norm")(self._patches(x))
            x = nn.relu(jnp.concatenate([x, -x], axis=-1))
        # Pooled before bias and relu: the same numbers for a quarter of the work.
        conv_max_pool = functools.partial(
            convolution.conv_general_dilated, implementation=self.conv_implementation, pool=2
        )
        for features in self.features:
            x = nn.Conv(
                features,
                (self.kernel_size, self.kernel_size),
                padding=self.padding.upper(),
                use_bias=not self.batch_norm,
                kernel_init=_KERNEL_INIT,
                dtype=self.dtype,
                conv_general_dilated=conv_max_pool,
            )(x)
            x = nn.relu(norm()(x) if self.batch_norm else x)
        x = convolution.flatten(x)
        if self.hidden_features:
            x = nn.Dense(
                self.hidden_features,
                use_bias=not self.batch_norm,
                kernel_init=_KERNEL_INIT,
                dtype=self.dtype,
                dot_general=convolution.dot_general,
            )(x)
            x = nn.relu(norm()(x) if self.batch_norm else x)
        x = nn.Dense(self.num_classes, kernel_init=_KERNEL_INIT, dtype=self.dtype)(x)
        return x.astype(jnp.float32)

    def _patches(self, x: jax.Array) -> jax.Array:
        """The cosine coefficients of each patch: `[B, H // size, W // size, patch_features]`."""
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
        if len(shape) != 4:
            raise UserError(f"CNN takes images of shape [B, H, W, C], not {list(shape)}")
        padding = self.padding.upper() if isinstance(self.padding, str) else self.padding
        if padding not in ("VALID", "SAME"):
            raise UserError(f"model.padding={self.padding!r} must be VALID or SAME")
        if self.conv_implementation not in convolution.IMPLEMENTATIONS:
            raise UserError(
                f"model.conv_implementation={self.conv_implementation!r} must be one of "
                f"{', '.join(convolution.IMPLEMENTATIONS)}"
            )
        side = min(shape[1:3])
        if self.patch_size:
            available = self.patch_size**2 * shape[3]
            if self.patch_features > available:
                raise UserError(
                    f"model.patch_features={self.patch_features} is more than the {available} "
                    f"values in a patch of {self.patch_size}x{self.patch_size}x{shape[3]}"
                )
            side //= self.patch_size
            if not side:
                raise UserError(
                    f"model.patch_size={self.patch_size} is more than the {min(shape[1:3])} pixels "
                    f"of the images"
                )
        largest = 2 * max(shape[1:3]) - 1
        if self.kernel_size > largest:
            raise UserError(
                f"model.kernel_size={self.kernel_size} is too much for images of "
                f"{shape[1]}x{shape[2]} pixels: beyond {largest} nothing of it meets a pixel"
            )
        for block in range(len(self.features)):
            convolved = side if padding == "SAME" else side - self.kernel_size + 1
            if convolved < 2:
                raise UserError(
                    f"images of {shape[1]}x{shape[2]} pixels are too small for CNN: {side} "
                    f"pixels reach block {block + 1}, {max(convolved, 0)} its pooling, which "
                    f"needs 2; use fewer model.features, a smaller model.kernel_size"
                    f"{' or model.patch_size' if self.patch_size else ''} or "
                    f"model.padding=SAME"
                )
            side = convolved // 2


def cosine_filters(size: int, channels: int, count: int) -> np.ndarray:
    """The discrete cosine transform of a patch, as a kernel: `float32[size, size, C, count]`.

    Orthonormal, over rows, columns and channels: of red, green and blue it makes brightness and
    two colour differences. By rising frequency, that of colour counting twice, since in natural
    images colour varies less than brightness; on CIFAR-10 the order is close to that of the
    principal components.

    >>> cosine_filters(2, 1, 2)[..., 0, 1]  # left against right
    array([[ 0.5, -0.5],
           [ 0.5, -0.5]], dtype=float32)
    """
    space, colour = _cosines(size), _cosines(channels)
    filters = np.einsum("ah,bw,cd->hwdabc", space, space, colour)
    row, column, channel = np.indices((size, size, channels)).reshape(3, -1)
    order = np.argsort(row + column + 2 * channel, kind="stable")[:count]
    return filters.reshape(size, size, channels, -1)[..., order].astype(np.float32)


def _cosines(size: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II): a row for each frequency."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * frequency * (2 * position + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


_MODELS = {"cnn": CNN}
MODEL_NAMES = tuple(_MODELS)


def create_model(name: str, num_classes: int, **fields: Any) -> nn.Module:
    """Builds a model by its config name.

    Args:
      name: one of `MODEL_NAMES`.
      num_classes: number of logits.
      **fields: the module's own fields; `dtype` may be a name such as "bfloat16".

    Raises:
      UserError: for an unknown name, field or dtype.
    """
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODEL_NAMES)}")
    known = [field.name for field in dataclasses.fields(_MODELS[name]) if field.init]
    if unknown := [field for field in fields if field not in known]:
        raise UserError(f"model {name} has no field {unknown[0]!r}; known: {', '.join(known[:-2])}")
    if "dtype" in fields:
        try:
            fields["dtype"] = jnp.dtype(fields["dtype"])
        except TypeError as error:
            raise UserError(f"model.dtype={fields['dtype']!r} is not a dtype") from error
    return _MODELS[name](num_classes=num_classes, **fields)
