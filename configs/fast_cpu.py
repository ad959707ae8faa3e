"""The seed's 63.44 % on CIFAR-10 from a cold start, in seconds, on two cores.

python train.py --config configs/fast_cpu.py
"""

from ml_collections import ConfigDict

from configs import baseline


def get_config() -> ConfigDict:
    """A small network that learns in one pass; chosen on the last 5,000 training images."""
    config = baseline.get_config()
    # Zero mean per channel: brightness no longer outweighs every other coefficient.
    config.dataset.normalization = "standardize"
    # Whitened patches stand in for a first convolution, at a sixteenth of the positions.
    config.model.patch_size = 4
    # Half of what there is; 20 cost 0.6 points of accuracy, 28 gain nothing.
    config.model.patch_features = 24
    # One block: a second gains 1.5 points, but costs 2 s of training and 1 s of compilation.
    config.model.features = (96,)
    # On a map of 8x8 the border is half of all.
    config.model.padding = "SAME"
    # Straight to the logits: fewer parameters, less to compile, better after one epoch.
    config.model.hidden = 0
    # Allows ten times the learning rate: 9 points more after one epoch.
    config.model.batch_norm = True
    # 64 learns no more in an epoch and runs slower; 256 learns less.
    config.batch_size = 128
    config.num_epochs = 1
    config.optimizer.learning_rate = 1e-2
    # To zero, or the last steps' noise stays in the weights.
    config.schedule.name = "linear"
    return config
