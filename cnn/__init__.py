"""Trains CNN image classifiers with JAX and Flax: the parts, for scripts of your own.

Importing it starts no backend, reads no flag and touches no file.
"""

from cnn.augment import Mix, create_augment
from cnn.augment.resizing import ProgressiveResizing
from cnn.averaging import ExponentialMovingAverage, Lookahead
from cnn.config import load_config
from cnn.data import Dataset, Split, load_dataset, load_folder, load_images
from cnn.data.pipeline import DeviceSplit, Pipeline, epoch_permutation, normalize
from cnn.errors import Interrupted, UserError
from cnn.evaluation import evaluate
from cnn.execution import compile_train_steps
from cnn.groups import train_group
from cnn.inference import TrainedModel, load_run
from cnn.losses import CrossEntropy, create_loss
from cnn.metrics import Metrics
from cnn.models import CNN, SpeedNet, create_model
from cnn.ops.fast_cpu import fast_cpu
from cnn.optimizers import create_optimizer, create_schedule
from cnn.runtime.checkpoints import CheckpointManager, digest
from cnn.runtime.devices import (
    batch_sharding,
    data_mesh,
    limit_in_flight,
    replicated_sharding,
    select_devices,
    use_all_cpu_cores,
)
from cnn.steps import (
    TrainState,
    create_train_state,
    eval_step,
    predict_step,
    train_step,
    train_steps,
)
from cnn.training import train_and_evaluate

__all__ = [
    "CNN",
    "CheckpointManager",
    "CrossEntropy",
    "Dataset",
    "DeviceSplit",
    "ExponentialMovingAverage",
    "Interrupted",
    "Lookahead",
    "Metrics",
    "Mix",
    "Pipeline",
    "ProgressiveResizing",
    "SpeedNet",
    "Split",
    "TrainState",
    "TrainedModel",
    "UserError",
    "batch_sharding",
    "compile_train_steps",
    "create_augment",
    "create_loss",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_train_state",
    "data_mesh",
    "digest",
    "epoch_permutation",
    "eval_step",
    "evaluate",
    "fast_cpu",
    "limit_in_flight",
    "load_config",
    "load_dataset",
    "load_folder",
    "load_images",
    "load_run",
    "normalize",
    "predict_step",
    "replicated_sharding",
    "select_devices",
    "train_and_evaluate",
    "train_group",
    "train_step",
    "train_steps",
    "use_all_cpu_cores",
]
