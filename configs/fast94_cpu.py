"""94 % on CIFAR-10 on CPU cores: speed94 with smaller batches, and with smaller images at first.

python train.py --config configs/fast94_cpu.py
"""

from ml_collections import ConfigDict

from configs import speed94


def get_config() -> ConfigDict:
    """A CPU takes as long for an image in a small batch as in a large one."""
    config = speed94.get_config()
    config.batch_size = 1000
    config.num_epochs = 8.75
    config.optimizer.learning_rate = 0.17  # 0.24 / sqrt(2)
    config.optimizer.momentum = 0.7
    for group in config.optimizer.groups.values():  # decay goes with the batch: see speed94
        group.weight_decay = group.weight_decay * config.batch_size / 2000
    # 16x16, then 24x24 pixels.
    config.resizing.scales = (0.5, 0.75)
    config.resizing.until_epochs = (2.0, 5.0)
    return config
