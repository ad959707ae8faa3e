"""The same network on scikit-learn's handwritten digits: nothing to download.

    python train.py --config configs/digits.py

1,797 grey images of 8x8 pixels; 1,437 train, 360 test. See README.md for figures.
"""

from ml_collections import ConfigDict

from configs import baseline


def get_config() -> ConfigDict:
    """The baseline, fitted to tiny images."""
    config = baseline.get_config()
    config.dataset.name = "digits"
    # 8x8 pixels do not outlast two VALID convolutions with pooling.
    config.model.padding = "SAME"
    config.num_epochs = 20
    return config
