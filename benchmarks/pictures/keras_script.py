"""Classifies a folder of images as the Keras guides do, for `benchmarks.pictures.predict`.

python benchmarks/pictures/keras_script.py FOLDER
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from benchmarks.whole_runs.keras_script import build_model


def main(folder: str) -> None:
    """Prints the class of each image."""
    images = keras.utils.image_dataset_from_directory(
        folder,
        labels=None,
        image_size=(32, 32),
        batch_size=256,
        shuffle=False,
        crop_to_aspect_ratio=True,
        verbose=False,
    )
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), build_model()])
    for label in model.predict(images, verbose=0).argmax(-1):
        print(label)


if __name__ == "__main__":
    main(sys.argv[1])
