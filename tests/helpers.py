"""What several tests share: short configs, and processes of train.py."""

import re
import subprocess
import sys
import time
from pathlib import Path

import cnn

REPOSITORY = Path(__file__).parents[1]
ENDLESS = (f"--config={REPOSITORY / 'configs' / 'digits.py'}", "--config.num_epochs=100000")


def short_config():
    """A run of two short epochs that takes a few seconds."""
    config = cnn.load_config(REPOSITORY / "configs" / "digits.py")
    config.model.features = (4, 8)
    config.model.hidden_features = 16
    config.num_epochs = 2
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "constant"
    config.batch_size = 96  # 14 steps per epoch, and 93 images left out
    config.num_devices = 2
    return config


def without_waits(out):
    """What train.py printed, but for what a slow machine reports to take longer."""
    return re.sub(r"(?m)^.*( \.\.\..*|: [\d.]+ s)\n", "", out)


def train_command(*flags):
    return [sys.executable, str(REPOSITORY / "train.py"), *map(str, flags)]


def start(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def steps_in(run):
    return cnn.CheckpointManager(run / "checkpoints").all_steps()
