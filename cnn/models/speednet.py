"""The network of the CIFAR-10 speed recipes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.errors import UserError
from cnn.models.checks import check_fields, check_image_rank
from cnn.models.conv_pool import ConvPool
from cnn.models.initializers import identity_first, uniform_fan_in, unit_std, whitening_kernel
from cnn.ops.activations import gelu
from cnn.ops.convolution import add_bias, conv_general_dilated, max_pool
from cnn.registry import shown

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}
_PATCH = 2  # side of the whitened patches, in pixels


class SpeedNet(nn.Module):
    """A whitening layer, groups of convolutions with batch normalization, a scaled linear head.

    Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, section 3;
    residual groups of three convolutions as in its network for 96 %. With the defaults and 32x32x3
    images it has 1,971,640 parameters for 10 classes; with `widths=(128, 384, 512)` and `depth=3`
    9,915,704.

    The kernel of the first convolution whitens 2x2 patches: `init_from_images` computes it from
    training images, and it gets no gradient. An optimizer with weight decay would still shrink it:
    freeze "whiten/kernel" (`optimizer.freeze`).

    Attributes:
      num_classes: number of logits.
      widths: output channels of each group, which halves height and width.
      depth: convolutions in a group, 2 or 3; from the second of three on they are residual.
      activation: a key of `ACTIVATIONS`; after the whitening layer it is always "gelu".
      logit_scale: by which the logits are multiplied.
      normalize_head: whether the head begins with weights of standard deviation 1, in place of
        uniform ones in +-1 / sqrt(width).
      random_whitening_bias: whether the whitening bias begins with uniform values in
        +-1 / sqrt(12), in place of 0.
      batch_norm_momentum: the part of the running statistics that remains at each step.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      conv_implementation: one of `cnn.ops.convolution.IMPLEMENTATIONS`.
    """

    num_classes: int
    widths: Sequence[int] = (64, 256, 256)
    depth: int = 2
    activation: str = "gelu"
    logit_scale: float = 1 / 9
    normalize_head: bool = False
    random_whitening_bias: bool = False
    batch_norm_momentum: float = 0.6
    dtype: Any = jnp.float32
    conv_implementation: str = "auto"
    # The logits of an image depend on other images by batch statistics in training only.
    per_example: ClassVar[bool] = True
    # How many training images `init_from_images` wants.
    num_init_images: ClassVar[int] = 5000

    def __post_init__(self) -> None:
        check_fields(self, widths=1)
        if self.depth not in (2, 3):
            raise UserError(f"model.depth={shown(self.depth)} must be 2 or 3")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"model.activation={shown(self.activation)} must be one of {', '.join(ACTIVATIONS)}"
            )
        if not 0 <= self.batch_norm_momentum < 1:
            raise UserError(
                f"model.batch_norm_momentum={self.batch_norm_momentum} must be at least 0 and "
                f"below 1"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Normalized images `float[B, H, W, C]` -> logits `float32[B, num_classes]`.

        With `train` the batch's own statistics normalize it and update `batch_stats`.

        Raises:
          UserError: the images are too small for the groups.
        """
        check_image_rank(self, image.shape)
        _, height, width, channels = image.shape
        side = (min(height, width) - _PATCH + 1) // 2 ** len(self.widths)
        if side < 1:
            raise UserError(
                f"images of {height}x{width} pixels are too small for SpeedNet with "
                f"{len(self.widths)} groups, which need {2 ** len(self.widths) + 1}; use fewer "
                f"model.widths"
            )
        x = gelu(self._whiten(image.astype(self.dtype), channels))
        for group, features in enumerate(self.widths):
            x = self._group(x, features, group, train)
        x = max_pool(x, x.shape[1:3], x.shape[1:3], implementation=self.conv_implementation)
        head = nn.Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=unit_std(uniform_fan_in) if self.normalize_head else uniform_fan_in,
            dtype=self.dtype,
            name="head",
        )
        return head(x.reshape(x.shape[0], -1)).astype(jnp.float32) * self.logit_scale

    def _whiten(self, x: jax.Array, channels: int) -> jax.Array:
        """`float[B, H, W, C]` -> `float[B, H - 1, W - 1, 8 C]`."""
        return _Whiten(
            2 * _PATCH * _PATCH * channels,
            random_bias=self.random_whitening_bias,
            dtype=self.dtype,
            implementation=self.conv_implementation,
            name="whiten",
        )(x)

    def _group(self, x: jax.Array, features: int, group: int, train: bool) -> jax.Array:
        """`float[B, H, W, C]` -> `float[B, H // 2, W // 2, features]`."""
        activation = ACTIVATIONS[self.activation]
        kernel_init = identity_first(uniform_fan_in)

        def norm(x: jax.Array, layer: int) -> jax.Array:
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=self.batch_norm_momentum,
                epsilon=1e-12,
                use_scale=False,
                # With so small an epsilon E[x^2] - E[x]^2 may come out negative.
                use_fast_variance=False,
                dtype=self.dtype,
                name=f"norm_{group}_{layer}",
            )(x)

        x = ConvPool(
            features,
            padding="SAME",
            use_bias=False,
            kernel_init=kernel_init,
            dtype=self.dtype,
            implementation=self.conv_implementation,
            name=f"conv_{group}_0",
        )(x)
        x = shortcut = activation(norm(x, 0))
        for layer in range(1, self.depth):
            x = nn.Conv(
                features,
                (3, 3),
                use_bias=False,
                kernel_init=kernel_init,
                dtype=self.dtype,
                conv_general_dilated=functools.partial(
                    conv_general_dilated, implementation=self.conv_implementation
                ),
                name=f"conv_{group}_{layer}",
            )(x)
            x = norm(x, layer)
            x = activation(x + shortcut if layer == 2 else x)
        return x

    def init_from_images(self, params: Any, images: Any) -> Any:
        """The parameters with the whitening kernel of some images.

        Args:
          params: of this module.
          images: training images, normalized as in training and not augmented, `float32[N, H, W,
            C]`; 5,000 in the recipe.
        """
        whiten = {**params["whiten"], "kernel": whitening_kernel(images, _PATCH)}
        return {**params, "whiten": whiten}


class _Whiten(nn.Module):
    """A VALID convolution whose kernel gets no gradient, with a bias that does."""

    features: int
    random_bias: bool
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (_PATCH, _PATCH, x.shape[-1], self.features)
        kernel = self.param("kernel", uniform_fan_in, shape, jnp.float32)
        bound = (_PATCH * _PATCH * x.shape[-1]) ** -0.5
        bias_init = nn.initializers.zeros
        if self.random_bias:
            bias_init = _uniform(bound)
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        y = conv_general_dilated(
            x,
            jax.lax.stop_gradient(kernel).astype(self.dtype),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            implementation=self.implementation,
        )
        return add_bias(y, bias)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in +-bound."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
