"""Whole seeds of a recipe, as speed runs are published, beside the original script."""
