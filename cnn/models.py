"""Networks: linen modules from images `[B, H, W, C]` to logits `[B, num_classes]`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn import layers
from cnn.errors import InputError

# Keras's default, which the seed was trained with; Flax's own is lecun_normal.
_KERNEL_INIT = nn.initializers.glorot_uniform()


class CNN(nn.Module):
    """Blocks of convolution, 2x2 max-pooling and relu, then two dense layers.

    With the defaults and 32x32x3 images this is the Keras tutorial network of the README:
    167,562 parameters for 10 classes.

    Attributes:
      num_classes: number of logits.
      features: output channels of each block.
      kernel_size: height and width of the convolutions, in pixels.
      padding: "VALID" (no padding, as in the seed) or "SAME" (zeros keep the size).
      hidden: width of the first dense layer.
      dtype: of the computation; parameters and logits stay float32.
      conv_lowering: how convolution and pooling are computed, one of `layers.LOWERINGS`.

    >>> model = CNN(num_classes=10)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> model.apply(variables, jnp.zeros((8, 32, 32, 3))).shape
    (8, 10)
    """

    num_classes: int
    features: Sequence[int] = (32, 64)
    kernel_size: int = 3
    padding: str = "VALID"
    hidden: int = 64
    dtype: Any = jnp.float32
    conv_lowering: str = "auto"

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, H, W, C]` -> `float32[B, num_classes]`; training changes nothing here.

        Raises:
          InputError: if the image is too small for the blocks.
        """
        del train
        self._check_size(image.shape)
        x = image.astype(self.dtype)
        # Pooled before bias and relu: the same numbers for a quarter of the work.
        conv_max_pool = functools.partial(layers.conv_max_pool, lowering=self.conv_lowering)
        for features in self.features:
            x = nn.Conv(
                features,
                (self.kernel_size, self.kernel_size),
                padding=self.padding,
                kernel_init=_KERNEL_INIT,
                dtype=self.dtype,
                conv_general_dilated=conv_max_pool,
            )(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=_KERNEL_INIT, dtype=self.dtype)(x))
        x = nn.Dense(self.num_classes, kernel_init=_KERNEL_INIT, dtype=self.dtype)(x)
        return x.astype(jnp.float32)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4:
            raise InputError(f"CNN takes images of shape [B, H, W, C], not {list(shape)}")
        side = min(shape[1:3])
        for block in range(len(self.features)):
            convolved = side if self.padding == "SAME" else side - self.kernel_size + 1
            if convolved < 2:
                raise InputError(
                    f"images of {shape[1]}x{shape[2]} pixels are too small for CNN: {side} "
                    f"pixels reach block {block + 1}, {max(convolved, 0)} its pooling, which "
                    f"needs 2; use fewer model.features, a smaller model.kernel_size or "
                    f"model.padding=SAME"
                )
            side = convolved // 2


_MODELS = {"cnn": CNN}
MODEL_NAMES = tuple(_MODELS)


def create_model(name: str, num_classes: int, **fields: Any) -> nn.Module:
    """Builds a model by its config name.

    Args:
      name: one of `MODEL_NAMES`.
      num_classes: number of logits.
      **fields: the module's own fields; `dtype` may be a name such as "bfloat16".

    Raises:
      InputError: for an unknown name.
    """
    if name not in _MODELS:
        raise InputError(f"unknown model {name!r}; known: {', '.join(MODEL_NAMES)}")
    if "dtype" in fields:
        fields["dtype"] = jnp.dtype(fields["dtype"])
    return _MODELS[name](num_classes=num_classes, **fields)
