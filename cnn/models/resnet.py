"""Residual networks for small images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.errors import UserError
from cnn.models.checks import check_fields, check_image_rank
from cnn.ops.convolution import conv_general_dilated


class ResNet(nn.Module):
    """Stages of basic residual blocks, global average pooling and a dense layer.

    He et al. 2016, "Deep residual learning for image recognition", section 3, with the stem that
    images of about 32x32 pixels need: a 3x3 convolution without pooling. With the defaults this is
    ResNet-18: 11,173,962 parameters for 3 channels and 10 classes.

    Attributes:
      num_classes: number of logits.
      stage_sizes: number of blocks in each stage. From the second stage on, a stage halves height
        and width and doubles the channels.
      features: channels of stem and first stage.
      stochastic_depth_rate: in training the convolutions of the last block are left out for an
        image with this probability, and those of block l of L with l / L times it: Huang et al.
        2016, "Deep networks with stochastic depth", eq. 4. Each image has its own draw, from the
        stream "dropout"; what is left is divided by the probability to be left, so that inference
        needs no correction. 0 is the plain network.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      conv_implementation: one of `cnn.ops.convolution.IMPLEMENTATIONS`. With an optimizer that uses
        the sign of the gradient choose "patches": "auto" may round gradients that are exactly zero.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    features: int = 64
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    conv_implementation: str = "auto"
    # The logits of an image depend on other images by batch statistics in training only.
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, stage_sizes=1, features=1)
        if not 0 <= self.stochastic_depth_rate < 1:
            raise UserError(
                f"model.stochastic_depth_rate={self.stochastic_depth_rate} must be at least 0 and "
                f"below 1"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Normalized images `float[B, H, W, C]` -> logits `float32[B, num_classes]`.

        With `train` the batch's own statistics normalize it and update `batch_stats`, and blocks
        are left out.
        """
        check_image_rank(self, image.shape)
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            conv_general_dilated=functools.partial(
                conv_general_dilated, implementation=self.conv_implementation
            ),
        )
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        drop = functools.partial(nn.Dropout, broadcast_dims=(1, 2, 3), deterministic=not train)
        step = self.stochastic_depth_rate / sum(self.stage_sizes)
        x = conv(self.features, (3, 3), padding=1)(image.astype(self.dtype))
        x = nn.relu(norm()(x))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = _ResidualBlock(
                    features=self.features * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    drop_rate=step * (sum(self.stage_sizes[:stage]) + block + 1),
                    conv=conv,
                    norm=norm,
                    drop=drop,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    drop_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    drop: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, (3, 3), self.stride, padding=1)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(self.features, (3, 3), padding=1)(y))
        if self.drop_rate:
            y = self.drop(self.drop_rate)(y)
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), self.stride, padding=0, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)
