"""Multiplications and additions of a run, two per multiply-add, as published speed runs count them.

Only products with weights are counted, those of convolutions (the zeros of SAME padding included)
and of dense layers. Training takes three times the forward pass: the gradient of the weights and
that of the input are a product each. What gets no gradient is left out: the input of the first
layer, and the kernels that the config freezes. A proxy that chooses images counts as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn import UserError, create_model
from cnn.augment.resizing import ProgressiveResizing, Stage, scaled_size
from cnn.evaluation import TEST_TIME_VIEWS
from cnn.models import model_schema
from cnn.models.summary import model_layers
from cnn.ops.linen_apply import ModuleApply
from cnn.optimizers import frozen


@dataclasses.dataclass(frozen=True)
class NetworkFlop:
    """Of a network, for one image.

    Attributes:
      forward: of the forward pass.
      training: of the forward pass and the gradients.
    """

    forward: float
    training: float


@dataclasses.dataclass(frozen=True)
class RunFlop:
    """Of a whole run.

    Attributes:
      training: of all steps.
      evaluation: of the final test, with all its views of each image; tests before it are not
        counted.
    """

    training: float
    evaluation: float

    @property
    def total(self) -> float:
        """What is published as the cost of a speed run."""
        return self.training + self.evaluation


def network_flop(
    model: nn.Module, image_shape: tuple[int, int, int], freeze: Sequence[str] = ()
) -> NetworkFlop:
    """Counts the products of a network; nothing is computed.

    Args:
      model: a linen module of images `[B, H, W, C]`.
      image_shape: (H, W, C).
      freeze: patterns of the parameters without gradients, as in `optimizer.freeze`.

    >>> from cnn.models.speednet import SpeedNet
    >>> flop = network_flop(SpeedNet(10), (32, 32, 3), ("whiten/kernel",))
    >>> round(flop.forward / 1e6, 1), round(flop.training / 1e6, 1)
    (236.3, 707.8)
    """
    variables, first = _variables_and_first_layer(model, image_shape)
    is_frozen = frozen(variables["params"], freeze)
    forward = training = 0.0
    for layer in model_layers(model, variables, image_shape):
        held: Any = is_frozen
        for name in layer.name.split("/"):
            held = held[name]
        passes = 3 - (layer.name == first) - bool(held.get("kernel"))
        forward += layer.flops
        training += passes * layer.flops
    return NetworkFlop(forward, training)


def run_flop(
    config: Mapping[str, Any], dataset: Mapping[str, Any], num_steps: int | None = None
) -> RunFlop:
    """The cost of a run, from what its directory records.

    Args:
      config: `config.json`.
      dataset: `dataset.json`.
      num_steps: of the run; None: as many as the config asks for.

    Raises:
      UserError: the model was passed by a script, so the config does not say what it is.
    """
    stages = run_stages(config, dataset, num_steps)
    training = sum(_stage_flop(config, dataset, stage) for stage in stages)
    flop = _of_config(config, dataset, "model")
    views = len(TEST_TIME_VIEWS[config["evaluation"]["tta"]])
    return RunFlop(training, evaluation=dataset["test_count"] * views * flop.forward)


def run_stages(
    config: Mapping[str, Any], dataset: Mapping[str, Any], num_steps: int | None = None
) -> list[Stage]:
    """The parts of a run with images of one size; arguments as for `run_flop`."""
    steps_per_epoch = dataset["train_count"] // config["batch_size"]
    if num_steps is None:
        num_steps = round(config["num_epochs"] * steps_per_epoch)
    resizing = ProgressiveResizing(**config.get("resizing", {}))
    return resizing.stages(num_steps, steps_per_epoch)


def _stage_flop(config: Mapping[str, Any], dataset: Mapping[str, Any], stage: Stage) -> float:
    """Of the steps of a stage."""
    num_steps, batch_size = stage.stop - stage.start, config["batch_size"]
    flop = _of_config(config, dataset, "model", stage.scale)
    proxy = config.get("proxy", {"name": "none"})
    if proxy["name"] == "none":
        return num_steps * batch_size * flop.training
    chooses, every = _of_config(config, dataset, "proxy", stage.scale), proxy["update_every"]
    updates = -(-stage.stop // every) - -(-stage.start // every)
    choosing = num_steps * chooses.forward + updates * (chooses.training - chooses.forward)
    return num_steps * proxy["keep"] * flop.training + batch_size * choosing


def _of_config(
    config: Mapping[str, Any], dataset: Mapping[str, Any], section: str, scale: float = 1.0
) -> NetworkFlop:
    """Of the network of a section, "model" or "proxy", for images of a scale."""
    fields, num_classes = config[section], len(dataset["class_names"])
    if "name" not in fields:
        raise UserError(
            "the run has a model that a script passed: its FLOPs cannot be counted from its config"
        )
    own = {name: fields[name] for name in ("name", *model_schema(fields["name"])) if name in fields}
    holder = config["optimizer"] if section == "model" else fields
    *size, channels = dataset["image_shape"]
    shape = (*scaled_size(tuple(size), scale), channels)
    model = create_model(num_classes=num_classes, **own)
    return _network_flop(model, shape, tuple(holder.get("freeze", ())))


# A run asks for the same networks at the end of each epoch.
_network_flop = functools.cache(network_flop)


def _variables_and_first_layer(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[Any, str]:
    """Shapes of the variables, and which module with a kernel is called first."""
    called: list[str] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            called.append("/".join(module.path))
        return y

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        _, variables = jax.eval_shape(ModuleApply(model).init, jax.random.key(0), image)
    return variables, called[0] if called else ""
