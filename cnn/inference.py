"""A trained run as a model: weights, class names and predictions."""
