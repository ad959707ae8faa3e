"""Datasets as arrays in memory: `load_dataset(name)` finds, prepares and decodes them."""

from cnn.data.dataset import Dataset, Split
from cnn.data.sources import load_dataset

__all__ = ["Dataset", "Split", "load_dataset"]
