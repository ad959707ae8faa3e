"""A convolution with 2x2 max pooling as one layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.ops.convolution import add_bias, conv_general_dilated


class ConvPool(nn.Module):
    """Convolution, then 2x2 max pooling with stride 2, then the bias.

    The pooling comes before bias and relu: the same numbers for a quarter of the work. Parameters
    are those of `nn.Conv`, `kernel` and `bias`; under the same module name they are drawn alike.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      padding: "VALID" or "SAME".
      use_bias: whether to add a bias.
      kernel_init: initializer of the kernel.
      dtype: of the computation; parameters are float32.
      implementation: one of `cnn.ops.convolution.IMPLEMENTATIONS`.
    """

    features: int
    kernel_size: int = 3
    padding: str = "VALID"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`float[B, H, W, C]` -> `float[B, H' // 2, W' // 2, K]`; see `convolved_shape`."""
        shape = self.kernel_size, self.kernel_size, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            implementation=self.implementation,
            pool=2,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = add_bias(y, bias)
        return y

    def convolved_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(H', W', K), the shape before the pooling, of images (..., H, W, C)."""
        lost = self.kernel_size - 1 if self.padding == "VALID" else 0
        return image_shape[-3] - lost, image_shape[-2] - lost, self.features
