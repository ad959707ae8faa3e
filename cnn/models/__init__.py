"""Networks: linen modules from images `[B, H, W, C]` to logits `[B, num_classes]`.

A new network is a file of its own and a row in `MODELS`; its fields are the fields of its configs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cnn.errors import UserError
from cnn.models.cnn import CNN
from cnn.models.conv_pool import ConvPool
from cnn.models.dct_cnn import DctCNN
from cnn.models.resnet import ResNet
from cnn.models.speednet import SpeedNet
from cnn.registry import Schema, complete, schema, select

__all__ = [
    "CNN",
    "MODELS",
    "ConvPool",
    "DctCNN",
    "ResNet",
    "SpeedNet",
    "create_model",
    "model_schema",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "dct_cnn": DctCNN,
    "resnet18": ResNet,
    "speednet": SpeedNet,
}
_DTYPES = ("float32", "bfloat16")


def model_schema(name: str) -> Schema:
    """The fields of a model that a config may set.

    Raises:
      UserError: there is no model of this name.
    """
    return schema(select("model", MODELS, name), without=("num_classes",))


def create_model(name: str, num_classes: int, **fields: Any) -> nn.Module:
    """Builds a model by its config name.

    Args:
      name: a key of `MODELS`.
      num_classes: number of logits.
      **fields: fields of the module. A `dtype` is float32 or bfloat16, by name or as a dtype.

    Raises:
      UserError: the name or a field is unknown, or a value is impossible.

    >>> create_model("cnn", 10, features=[8], dtype="bfloat16").features
    (8,)
    """
    if fields.get("dtype") is not None and not isinstance(fields["dtype"], str):
        fields["dtype"] = jnp.dtype(fields["dtype"]).name
    fields = complete("model", model_schema(name), fields)
    if fields.get("dtype") is not None:
        if fields["dtype"] not in _DTYPES:
            raise UserError(f"model.dtype={fields['dtype']!r} must be one of {', '.join(_DTYPES)}")
        fields["dtype"] = jnp.dtype(fields["dtype"])
    return MODELS[name](num_classes=num_classes, **fields)
