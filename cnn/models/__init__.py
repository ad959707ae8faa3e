"""Networks: linen modules from images `[B, H, W, C]` to logits `[B, K]`."""

from typing import Any

from cnn.models.cnn import CNN
from cnn.models.cnn import create_model as _create
from cnn.registry import Schema, complete, schema, select

MODELS = {"cnn": CNN}


def model_schema(name: str) -> Schema:
    """The fields of a model."""
    return schema(select("model", MODELS, name), without=("num_classes",))


def create_model(name: str, num_classes: int, **fields: Any) -> Any:
    """Builds a model."""
    return _create(name, num_classes, **complete("model", model_schema(name), fields))
