"""Trains CNN image classifiers with JAX and Flax: the parts, for scripts of your own.

Importing it starts no backend, reads no flag and touches no file.
"""

from cnn.checkpoints import Checkpoints, digest
from cnn.config import load_config
from cnn.data import Dataset, Split, load_dataset
from cnn.data.batches import DeviceSplit, epoch_order, normalize
from cnn.devices import (
    batch_mesh,
    find_devices,
    prepare_cpu,
    replicated,
    sharded,
    stay_close,
)
from cnn.errors import InputError, Interrupted
from cnn.evaluation import evaluate
from cnn.metrics import Metrics, total
from cnn.models import CNN, create_model
from cnn.optimizers import create_optimizer, create_schedule
from cnn.steps import (
    CrossEntropy,
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
    "Checkpoints",
    "CrossEntropy",
    "Dataset",
    "DeviceSplit",
    "InputError",
    "Interrupted",
    "Metrics",
    "Split",
    "TrainState",
    "batch_mesh",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_train_state",
    "digest",
    "epoch_order",
    "eval_step",
    "evaluate",
    "find_devices",
    "load_config",
    "load_dataset",
    "normalize",
    "predict_step",
    "prepare_cpu",
    "replicated",
    "sharded",
    "stay_close",
    "total",
    "train_and_evaluate",
    "train_step",
    "train_steps",
]
