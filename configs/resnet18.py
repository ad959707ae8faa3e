"""ResNet-18 on CIFAR-10, trained as is customary: SGD, cosine decay, random crops and flips.

    python train.py --config configs/resnet18.py

Test accuracy 64.01 % (1 seed) after one epoch: --config.num_epochs=1
--config.schedule.warmup_epochs=0.2, on 2 cores of an AMD EPYC with AVX-512, where it trains some 70
images a second; 74.31 % (1 seed) after two, --config.num_epochs=2. The 200 epochs were not run.
"""

from ml_collections import ConfigDict

from configs import baseline


def get_config() -> ConfigDict:
    """The customary recipe; its 200 epochs need an accelerator."""
    config = baseline.get_config()
    config.dataset.normalization = "standardize"
    config.batch_size = 128
    config.num_epochs = 200

    config.model = ConfigDict()
    # He et al. 2016, with a stem for small images (cnn/models/resnet.py).
    config.model.name = "resnet18"
    # Residual blocks of each stage; the first stage has `features` channels, each further one twice
    # as many at half the resolution.
    config.model.stage_sizes = (2, 2, 2, 2)
    config.model.features = 64
    # The probability to leave out the last block for an image in training; earlier ones less, in
    # proportion to their depth (Huang et al. 2016). 0 leaves out none.
    config.model.stochastic_depth_rate = 0.0
    # Of the computation: "float32" or "bfloat16". Parameters stay float32.
    config.model.dtype = "float32"
    # As in configs/baseline.py.
    config.model.conv_implementation = "auto"

    config.augment.flip = True
    # Crop at random from the image with a border of 4 pixels.
    config.augment.crop = 4

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    return config
