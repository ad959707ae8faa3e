"""Networks: linen modules from images `[B, H, W, C]` to logits `[B, K]`."""

from cnn.models.cnn import CNN, MODEL_NAMES, create_model

__all__ = ["CNN", "MODEL_NAMES", "create_model"]
