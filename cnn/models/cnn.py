"""The baseline network: the small CNN of the Keras tutorial."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.models.checks import check_blocks, check_fields
from cnn.models.conv_pool import ConvPool
from cnn.ops import convolution

# Keras's default, with which the baseline's figures were measured; Flax's is lecun_normal.
_KERNEL_INIT = nn.initializers.glorot_uniform()


class CNN(nn.Module):
    """Blocks of convolution, 2x2 max pooling and relu, then two dense layers.

    With the defaults and 32x32x3 images this is the Keras tutorial network of the README:
    167,562 parameters for 10 classes.

    Attributes:
      num_classes: number of logits.
      features: output channels of each block.
      kernel_size: height and width of the convolution kernels.
      padding: "VALID" shrinks the image at each convolution, "SAME" does not; in any case.
      hidden_features: width of the first dense layer; 0 leaves it out.
      dtype: of the computation; parameters and logits are float32.
      conv_implementation: one of `cnn.ops.convolution.IMPLEMENTATIONS`. With an optimizer that uses
        the sign of the gradient choose "patches": "auto" may round gradients that are exactly zero.

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
    dtype: Any = jnp.float32
    conv_implementation: str = "auto"
    # The logits of an image depend on no other image.
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.padding = str(self.padding).upper()
        check_fields(self, features=1, kernel_size=1, hidden_features=0)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Normalized images `float[B, H, W, C]` -> logits `float32[B, num_classes]`.

        Training changes nothing. Raises `UserError` if the images are too small for the blocks.
        """
        del train
        check_blocks(self, image.shape)
        x = image.astype(self.dtype)
        for block, features in enumerate(self.features):
            conv = ConvPool(
                features,
                self.kernel_size,
                self.padding,
                kernel_init=_KERNEL_INIT,
                dtype=self.dtype,
                implementation=self.conv_implementation,
                name=f"Conv_{block}",
            )
            x = nn.relu(conv(x))
        x = convolution.flatten(x)
        dense = functools.partial(nn.Dense, kernel_init=_KERNEL_INIT, dtype=self.dtype)
        if self.hidden_features:
            x = nn.relu(dense(self.hidden_features, dot_general=convolution.dot_general)(x))
        return dense(self.num_classes)(x).astype(jnp.float32)
