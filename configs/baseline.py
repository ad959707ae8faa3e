"""The seed's network and recipe on CIFAR-10.

    python train.py --config configs/baseline.py

Test accuracy 69.57 % +- 1.00 (5 seeds), 105 s on 2 cores of an AMD EPYC where nothing was compiled
before.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field there is; other configs change a few of these."""
    config = ConfigDict()

    # Same seed, same devices, same versions: same bits.
    config.seed = 0

    config.dataset = ConfigDict()
    # cifar10, cifar100, mnist, fashion_mnist, digits, or any TFDS image classification set.
    config.dataset.name = "cifar10"
    # Where TFDS keeps it; "" means $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    config.dataset.data_dir = ""
    # "scale": pixel / 255, as in the seed. "standardize": per-channel mean 0, variance 1.
    config.dataset.normalization = "scale"

    config.augment = ConfigDict()
    # Mirror each training image with probability 1/2, another draw each time.
    config.augment.flip = False
    # Shift it by up to so many pixels both ways, the border reflected.
    config.augment.translate = 0

    config.model = ConfigDict()
    # The network: "cnn" (cnn/models/cnn.py).
    config.model.name = "cnn"
    # Channels of each block (convolution, relu, 2x2 max-pooling).
    config.model.features = (32, 64)
    # Pixels, both ways.
    config.model.kernel_size = 3
    # "VALID" shrinks the image at each convolution, "SAME" does not; in capitals or not.
    config.model.padding = "VALID"
    # Width of the dense layer before the logits; 0 leaves it out.
    config.model.hidden_features = 64
    # Before the blocks, a cosine transform of patches of so many pixels both ways, whitened by
    # batch normalization; nothing of it is trained. 0 is none.
    config.model.patch_size = 0
    # Coefficients kept of each patch, of low frequency first; each comes with both signs.
    config.model.patch_features = 24
    # Batch normalization before each relu.
    config.model.batch_norm = False
    # Of the computation: "float32" or "bfloat16". Parameters stay float32.
    config.model.dtype = "float32"
    # How convolutions are computed: "native", "patches" or "winograd" (cnn/ops/convolution.py explains).
    # "auto" chooses by backend and shape. Changes speed, and results by rounding. With an optimizer
    # that uses the sign of the gradient choose "patches": "winograd" rounds gradients of exactly 0.
    config.model.conv_implementation = "auto"

    # Images per step, over all devices. The last, incomplete batch of an epoch is left out
    # (another few images each time, as the order is new).
    config.batch_size = 32
    # Passes over the training images.
    config.num_epochs = 10
    # 0 is plain cross-entropy.
    config.label_smoothing = 0.0

    config.optimizer = ConfigDict()
    # "adam", "adamw" or "sgd" (with Nesterov momentum).
    config.optimizer.name = "adam"
    # The schedule's peak.
    config.optimizer.learning_rate = 1e-3
    # Of "sgd" only.
    config.optimizer.momentum = 0.9
    # On kernels only; decoupled for "adamw", L2 for the others.
    config.optimizer.weight_decay = 0.0
    # Largest global norm of the gradient; 0 does not clip.
    config.optimizer.grad_clip_norm = 0.0
    # Steps whose mean gradient makes one update.
    config.optimizer.grad_accumulation_steps = 1

    config.schedule = ConfigDict()
    # "constant", "cosine" or "linear" after the warm-up.
    config.schedule.name = "constant"
    # Linear rise from 0; fractions of an epoch are fine.
    config.schedule.warmup_epochs = 0.0
    # Where "cosine" and "linear" end, as a fraction of the peak.
    config.schedule.final_lr_fraction = 0.0

    # What to do about a step whose loss or gradients are not finite: "stop" the run and name it, or
    # "skip" its update and count it. Neither lets such numbers into a checkpoint.
    config.on_nonfinite = "stop"

    # Test images per call. Changes speed, and the test loss by rounding at most.
    config.eval_batch_size = 1000
    # Save within epochs too, each so many steps; 0 saves before the first epoch and after each.
    config.checkpoint_every_steps = 0

    # "cpu", "gpu" or "tpu" is an error where there is none; "auto" takes the fastest there is.
    config.platform = "auto"
    # Use so many devices at most; 0 uses all. On a CPU each core is one. The batch is spread over
    # the most devices that divide it, and each holds a copy of the dataset.
    config.num_devices = 0
    # Steps per compiled call; 0 is 50, or fewer where their images would take more than 50 MB, or 1
    # on a CPU with native convolutions, which are slow in a loop. Changes speed, and results by
    # rounding at most.
    config.steps_per_execution = 0

    # Same bits each time on a GPU too, where the fastest kernels do not promise it.
    config.deterministic = True

    # Keep what was compiled in the user's cache folder, where the next start finds it. JAX's own
    # JAX_COMPILATION_CACHE_DIR goes before.
    config.compilation_cache = True

    # Also write TensorBoard event files (pip install '.[tensorboard]').
    config.tensorboard = False
    return config
