"""The networks as plain linen modules, their optimizers, and how a jitted step is run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.contenders import plain
from benchmarks.peers.contenders import problem as shared


class Baseline(nn.Module):
    """The baseline as a Flax tutorial writes it.

    Attributes:
      dtype: of the computation, also below; parameters are float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, 32, 32, 3]` -> `float[B, 10]`."""
        del train
        x = image
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID", dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return nn.Dense(shared.NUM_CLASSES, dtype=self.dtype)(x)


class Net94(nn.Module):
    """The body of the 94 % network: whitening, three groups of two convolutions, a dense layer."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, 32, 32, 3]` -> `float[B, 10]`."""
        x = self._conv(image, shared.WHITENING_CHANNELS, "whiten", window=2)
        x = nn.gelu(x, approximate=False)
        for group, width in enumerate(shared.GROUPS):
            x = self._conv(x, width, f"conv_{group}_0")
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.gelu(self._norm(x, f"norm_{group}_0", train), approximate=False)
            x = self._conv(x, width, f"conv_{group}_1")
            x = nn.gelu(self._norm(x, f"norm_{group}_1", train), approximate=False)
        x = nn.max_pool(x, (3, 3), strides=(3, 3)).reshape(x.shape[0], -1)
        head = nn.Dense(shared.NUM_CLASSES, use_bias=False, dtype=self.dtype, name="head")
        return head(x) * shared.LOGIT_SCALE

    def _conv(self, x: jax.Array, features: int, name: str, window: int = 3) -> jax.Array:
        return nn.Conv(
            features,
            (window, window),
            padding="VALID" if name == "whiten" else "SAME",
            use_bias=name == "whiten",
            dtype=self.dtype,
            name=name,
        )(x)

    def _norm(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=shared.BATCH_NORM_DECAY,
            epsilon=shared.BATCH_NORM_EPSILON,
            use_scale=False,
            dtype=self.dtype,
            name=name,
        )(x)


class ResNet18(nn.Module):
    """ResNet-18 for small images, as people write it in Flax."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, 32, 32, 3]` -> `float[B, 10]`."""

        def conv_norm(
            x: jax.Array, features: int, name: str, size: int = 3, stride: int = 1
        ) -> Any:
            conv = nn.Conv(
                features,
                (size, size),
                strides=(stride, stride),
                padding=size // 2,
                use_bias=False,
                dtype=self.dtype,
                name=f"conv_{name}",
            )
            return norm(name=f"norm_{name}")(conv(x))

        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=shared.RESNET_DECAY,
            epsilon=shared.RESNET_EPSILON,
            dtype=self.dtype,
        )
        x = nn.relu(conv_norm(image, shared.RESNET_WIDTHS[0], "stem"))
        for stage, width in enumerate(shared.RESNET_WIDTHS):
            for block in range(shared.RESNET_BLOCKS):
                name, stride = f"{stage}_{block}", 2 if stage and not block else 1
                y = nn.relu(conv_norm(x, width, f"{name}_0", stride=stride))
                y = conv_norm(y, width, f"{name}_1")
                if x.shape != y.shape:
                    x = conv_norm(x, width, f"{name}_project", size=1, stride=stride)
                x = nn.relu(x + y)
        head = nn.Dense(shared.NUM_CLASSES, dtype=self.dtype, name="head")
        return head(x.mean(axis=(1, 2)))


class Plain(nn.Module):
    """A network of `plain.PLAIN`, as people write it in Flax.

    Attributes:
      network: its name.
    """

    network: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """`float[B, 32, 32, 3]` -> `float[B, 10]`."""
        names = (one.name for one in plain.sized_layers(self.network))
        layers = plain.PLAIN[self.network]
        return self._apply(layers, image, names, train)

    def _apply(
        self, layers: Sequence[plain.Layer], x: jax.Array, names: Iterator[str], train: bool
    ) -> jax.Array:
        bias = plain.has_bias(self.network)
        for kind, *sizes in layers:
            if kind == "residual":
                x = x + self._apply(sizes[0], x, names, train)
            elif kind == "conv":
                features, size, stride = sizes
                padding = size // 2 if size % 2 else 0
                x = nn.Conv(
                    features, (size, size), stride, padding,
                    use_bias=bias, dtype=self.dtype, name=next(names),
                )(x)  # fmt: skip
            elif kind == "depthwise":
                (size, stride), groups = sizes, x.shape[-1]
                x = nn.Conv(
                    groups, (size, size), stride, size // 2, feature_group_count=groups,
                    use_bias=bias, dtype=self.dtype, name=next(names),
                )(x)  # fmt: skip
            elif kind == "norm":
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=shared.RESNET_DECAY,
                    epsilon=shared.RESNET_EPSILON,
                    dtype=self.dtype,
                    name=next(names),
                )(x)
            elif kind == "layer_norm":
                norm = nn.LayerNorm(shared.RESNET_EPSILON, dtype=self.dtype, name=next(names))
                x = norm(x)
            elif kind == "dense":
                x = nn.Dense(sizes[0], use_bias=bias, dtype=self.dtype, name=next(names))(x)
            elif kind == "attention":
                heads = x.reshape(*x.shape[:2], 3, sizes[0], -1)
                x = nn.dot_product_attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
                x = x.reshape(*x.shape[:2], -1)
            else:
                x = _UNSIZED[kind](x)
        return x


_UNSIZED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "pool": lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)),
    "tokens": lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    "mean": lambda x: x.mean(axis=tuple(range(1, x.ndim - 1))),
}


def textbook_model(network: str, dtype: str = "float32") -> nn.Module:
    """A network, in plain layers that compute in `dtype`; parameters are float32."""
    named: dict[str, Any] = {
        "baseline": Baseline,
        "net94": Net94,
        "resnet18": ResNet18,
    }
    return named.get(network, functools.partial(Plain, network))(dtype=jnp.dtype(dtype))


def optimizer(network: str) -> optax.GradientTransformation:
    """Adam for the baseline, else SGD; that of net94 leaves the whitening kernel unchanged."""
    rate = shared.LEARNING_RATE[network]
    if network == "baseline":
        return optax.adam(rate, eps=shared.ADAM_EPSILON)
    sgd = optax.sgd(rate, momentum=shared.MOMENTUM[network], nesterov=network == "net94")
    if network != "net94":
        return sgd

    def labels(params: Any) -> Any:
        whiten = {"kernel": "frozen", "bias": "trained"}
        trained = jax.tree.map(lambda _: "trained", dict(params))
        return {**trained, "whiten": whiten}

    return optax.multi_transform({"trained": sgd, "frozen": optax.set_to_zero()}, labels)


@dataclasses.dataclass
class JaxProgram:
    """Calls a jitted step from Python, as a training loop does.

    Attributes:
      initial: the state to start from; it is copied, since `step` may donate its state.
      step: (state, image, label) -> (state, result).
      loss: result -> mean loss.
      forward: (state, image) -> logits.
      images: a device array per batch.
      labels: a device array per batch.
      settle: called with the results so far after each step.
    """

    initial: Any
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, Any]]
    loss: Callable[[Any], Any]
    forward: Callable[[Any, jax.Array], jax.Array]
    images: Sequence[jax.Array]
    labels: Sequence[jax.Array]
    settle: Callable[[Sequence[Any]], None] = lambda results: None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Restores the initial state."""
        self._state = jax.block_until_ready(jax.tree.map(jnp.copy, self.initial))

    def losses(self, count: int) -> list[float]:
        """Of the first steps, from the current state."""
        return [float(self.loss(self._run(1, start))) for start in range(count)]

    def logits(self) -> np.ndarray:
        """Of the first batch."""
        return np.asarray(self.forward(self._state, self.images[0]).astype(jnp.float32))

    def train(self, steps: int) -> None:
        """Dispatches `steps` steps and waits for the last."""
        self._run(steps)

    def infer(self, steps: int) -> None:
        """Dispatches `steps` batches and waits for all."""
        results = []
        for step in range(steps):
            results.append(self.forward(self._state, self.images[step % len(self.images)]))
            self.settle(results)
        jax.block_until_ready(results)

    def _run(self, steps: int, start: int = 0) -> Any:
        results = []
        for step in range(start, start + steps):
            batch = step % len(self.images)
            self._state, result = self.step(self._state, self.images[batch], self.labels[batch])
            results.append(result)
            self.settle(results)
        jax.block_until_ready(self._state)
        return results[-1]
