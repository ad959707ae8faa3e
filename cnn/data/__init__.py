"""Datasets as arrays in memory: by name, or from a folder of pictures; decoded once."""

from cnn.data.dataset import Dataset, Split
from cnn.data.folder import load_folder
from cnn.data.images import load_images
from cnn.data.sources import load_dataset

__all__ = ["Dataset", "Split", "load_dataset", "load_folder", "load_images"]
