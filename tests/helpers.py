"""What several tests share: short configs, and processes of train.py."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax

import cnn
from cnn.execution import TrainSteps

REPOSITORY = Path(__file__).parents[1]
ENDLESS = (f"--config={REPOSITORY / 'configs' / 'digits.py'}", "--config.num_epochs=100000")

# For `jax.jit` where what matters is the bits of what a user's process compiles: XLA's defaults,
# which the processes of the tests do without (see `conftest.py`).
OPTIMIZED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 12):  # later versions know no other way
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def short_config():
    """A run of two short epochs that takes a few seconds."""
    config = cnn.load_config(REPOSITORY / "configs" / "digits.py")
    config.model.features = (4, 8)
    config.model.hidden_features = 16
    config.num_epochs = 2
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "constant"
    config.batch_size = 96  # 14 steps per epoch, and 93 images left out
    config.runtime.num_devices = 2
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


class Killed(BaseException):
    """Ends a run as a kill would: not an Exception, so that nothing catches it on the way."""


def watch_calls(patch, before=None, after=None):
    """Has functions called before and after each call of the compiled training steps.

    Args:
      patch: of pytest.
      before: takes the numbers of steps of all calls so far, that of the next one last.
      after: takes the same, and the new state.
    """
    calls = []

    class Watched(TrainSteps):
        def __call__(self, state, batches, num_steps):
            calls.append(num_steps)
            if before:
                before(calls)
            state, metrics = super().__call__(state, batches, num_steps)
            if after:
                after(calls, state)
            return state, metrics

    patch.setattr("cnn.training.compile_train_steps", Watched)
    return calls


def kill_at(step):
    """A writer that ends the run after the record of a step, before its checkpoint."""

    def kill(record):
        if record["step"] == step:
            raise Killed

    return kill


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
