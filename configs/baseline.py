"""The baseline: the Keras tutorial's small CNN and its recipe, on CIFAR-10.

    python train.py --config configs/baseline.py

Test accuracy 69.69 % +- 0.62 (6 seeds), 105 s on 2 cores of an AMD EPYC where nothing was compiled
before.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """The fields of a run, and of what this one builds; other configs change a few of these."""
    config = ConfigDict()

    # Same seed, same devices, same versions: same bits.
    config.seed = 0
    # Of so many runs with the seeds seed, seed + 1 and so on; --config.sweep.FIELD="(A, B)" makes
    # one for each value of a field (docs/seeds.md).
    config.num_seeds = 1

    config.dataset = ConfigDict()
    # cifar10, cifar100, mnist, fashion_mnist, digits, or any TFDS image classification set.
    config.dataset.name = "cifar10"
    # Your own pictures, in a folder for each class (docs/datasets.md); the name is not used then.
    config.dataset.folder = ""
    # Side of the images in pixels, or "(height, width)"; 0 keeps their size, if all have the same.
    config.dataset.image_size = FieldReference(0, field_type=object)  # a number or a tuple
    # "crop" takes the largest centred part of each image that has the proportions of image_size,
    # "stretch" all of it.
    config.dataset.resize = "crop"
    # The part of each class to test on, for a folder or a dataset without a test split.
    config.dataset.test_fraction = 0.2
    # Another number sets other images aside.
    config.dataset.split_seed = 0
    # What to do about files of a folder that cannot be read: "skip" leaves them out, with a
    # warning; "stop" does not train.
    config.dataset.on_unreadable = "skip"
    # "scale": pixel / 255. "standardize": per-channel mean 0, variance 1.
    config.dataset.normalization = "scale"

    # Images per step, over all devices. The last, incomplete batch of an epoch is left out
    # (other images each time, as the order is new).
    config.batch_size = 32
    # Passes over the training images; a fraction ends within an epoch.
    config.num_epochs = 10.0
    # What is reported beside the loss, by the names of cnn/metrics.py.
    config.metrics = ("accuracy",)
    # The run directory whose latest weights a fresh run starts from; "" draws new ones. Layers that
    # depend on the number of classes are new where it differs. See docs/transfer.md.
    config.init_from = ""

    config.model = ConfigDict()
    # The network, of cnn/models/; the fields below are its own.
    config.model.name = "cnn"
    # Channels of each block (convolution, relu, 2x2 max-pooling).
    config.model.features = (32, 64)
    # Pixels, both ways.
    config.model.kernel_size = 3
    # "VALID" shrinks the image at each convolution, "SAME" does not; in capitals or not.
    config.model.padding = "VALID"
    # Width of the dense layer before the logits; 0 leaves it out.
    config.model.hidden_features = 64
    # Of the computation: "float32" or "bfloat16". Parameters stay float32.
    config.model.dtype = "float32"
    # How convolutions are computed: "native", "patches" or "winograd" (cnn/ops/convolution.py);
    # "auto" chooses by backend and shape. Changes speed, and results by rounding. With an optimizer
    # that uses the sign of the gradient choose "patches": "winograd" rounds gradients of exactly 0.
    config.model.conv_implementation = "auto"

    config.loss = ConfigDict()
    # The training objective, of cnn/losses.py.
    config.loss.name = "cross_entropy"
    # 0 is plain cross-entropy.
    config.loss.label_smoothing = 0.0
    # Of the losses of a batch: "mean", or "sum", with which the gradients grow with the batch.
    config.loss.reduction = "mean"

    config.optimizer = ConfigDict()
    # Of cnn/optimizers.py; its other parameters, such as b1 and b2, may be set too.
    config.optimizer.name = "adam"
    # The schedule's peak.
    config.optimizer.learning_rate = 1e-3
    # On kernels only; decoupled for "adamw", "lion" and "lamb", L2 for the others.
    config.optimizer.weight_decay = 0.0
    # Largest global norm of the gradient; 0 does not clip.
    config.optimizer.grad_clip_norm = 0.0
    # Steps whose mean gradient makes one update.
    config.optimizer.grad_accumulation_steps = 1
    # Parameters that are not trained, by the path of a layer or a parameter, or a shell pattern of
    # one: ("Conv_0", "*/bias"). Running statistics still follow the images.
    config.optimizer.freeze = ()
    # Groups of parameters with optimizers and rates of their own: docs/recipes.md.

    config.schedule = ConfigDict()
    # "cosine" and "linear" fall to final_lr_fraction of the peak. "one_cycle" rises for pct_start
    # of the run, from the peak / div_factor, and falls to that / final_div_factor.
    config.schedule.name = "constant"
    # Linear rise to the peak; fractions of an epoch are fine.
    config.schedule.warmup_epochs = 0.0
    # The fraction of the peak at which it begins.
    config.schedule.warmup_from = 0.0
    # Multiply the rate, whatever the schedule, by plateau_factor after this many epochs in a row
    # whose mean training loss is not lower than the best; 0 does not.
    config.schedule.plateau_patience = 0
    # Between 0 and 1.
    config.schedule.plateau_factor = 0.1
    # The rate never falls below this fraction of the schedule's.
    config.schedule.plateau_min_scale = 0.0

    config.averaging = ConfigDict()
    # Of the weights, of cnn/averaging.py: "ema", whose average is what is scored, predicts and is
    # exported, or "lookahead", whose average the weights move to every few steps.
    config.averaging.name = "none"

    # Of the training images, by the names of cnn/augment/; False and 0 switch one off.
    config.augment = ConfigDict()
    # Mirror each training image with probability 1/2, anew in each epoch.
    config.augment.flip = False
    # Shift it by up to this many pixels in both directions; the border is reflected.
    config.augment.translate = 0

    config.resizing = ConfigDict()
    # Train on smaller images at first: scales of height and width, such as (0.5, 0.75).
    config.resizing.scales = ()
    # The epochs up to which each scale holds, such as (2.0, 5.0); whole images follow.
    config.resizing.until_epochs = ()

    config.evaluation = ConfigDict()
    # Score the test images once more, after the last epoch, by the mean of the logits of several
    # views: "flip" (mirrored too) or "flip_translate" (six views). result.json has it beside the
    # plain accuracy, which decides what is best.
    config.evaluation.tta = "none"

    config.early_stopping = ConfigDict()
    # End the run after this many epochs without improvement; 0 does not. The schedule stays that of
    # num_epochs.
    config.early_stopping.patience = 0
    # What must improve: "test_loss", "test_accuracy", "train_loss" and so on. Stopping by the test
    # images makes their accuracy optimistic.
    config.early_stopping.monitor = "test_loss"
    # By how much it must improve, as a fraction for accuracies.
    config.early_stopping.min_delta = 0.0

    # Where and how to run: results differ by rounding at most (but for "skip", once a step is not
    # finite), so a run may be resumed with other values.
    config.runtime = ConfigDict()
    # Where TFDS keeps the dataset; "" means $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    config.runtime.data_dir = ""
    # "cpu", "gpu" or "tpu" is an error where there is none; "auto" takes the fastest there is.
    config.runtime.platform = "auto"
    # The most devices to use; 0 uses all. On a CPU each core is one. The batch is sharded over the
    # most devices that divide it, and each holds a copy of the dataset.
    config.runtime.num_devices = 0
    # Steps per compiled call; 0 is a whole epoch on a GPU or TPU, if its images take at most 1 GiB,
    # and up to 50 on a CPU.
    config.runtime.steps_per_execution = 0
    # Test images per call.
    config.runtime.eval_batch_size = 1000
    # Save within epochs too, each time after this many steps; 0 saves before the first epoch and
    # after each.
    config.runtime.checkpoint_every_steps = 0
    # After a step whose loss or gradients are not finite, "stop" the run with a message, or "skip"
    # the update and count it. Neither lets such numbers into a checkpoint.
    config.runtime.on_nonfinite = "stop"
    # The same bits each time on a GPU too, where the fastest kernels do not promise it.
    config.runtime.deterministic = True
    # Compute the plain layers of a model of your own well on a CPU too (cnn/ops/fast_cpu.py); the
    # models of this repository need it not.
    config.runtime.fast_cpu = False
    # Cache compiled programs between runs in the user's cache folder; JAX_COMPILATION_CACHE_DIR
    # takes precedence.
    config.runtime.compilation_cache = True
    # Of several runs: "in_turn" trains each on all devices, as a single run; "per_device" one on
    # each device at the same time; "vmap" all seeds as one stacked program. "auto" is "per_device".
    config.runtime.group_layout = "auto"
    # Also write TensorBoard event files (pip install '.[tensorboard]').
    config.runtime.tensorboard = False
    return config
