"""What a script gets from `import cnn`, and what it does not."""

import subprocess
import sys

import cnn


def run(code):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_documented():
    for name in cnn.__all__:
        assert getattr(cnn, name).__doc__, name


def test_importing_is_light():
    heavy = [
        "tensorflow",
        "tensorflow_datasets",
        "orbax.checkpoint",
        "matplotlib",
        "sklearn",
        "PIL",
    ]
    assert run(f"import cnn, sys; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_importing_starts_no_backend():
    # The number of devices can be set only before a backend starts.
    run(
        "import cnn, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert len(jax.devices('cpu')) == 3"
    )


def test_a_script_of_ones_own():
    """The README's script, on data at hand."""
    run(
        """
import jax, numpy as np, optax
import cnn

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (64, 16, 16, 3), np.uint8)
split = cnn.Split(images, np.arange(64, dtype=np.int32) % 4)
data = cnn.Dataset.from_splits("mine", train=split, test=split, class_names=tuple("abcd"))
key = jax.random.key(0)
state = cnn.create_train_state(cnn.CNN(4), optax.adam(1e-3), key, data.image_shape)
train = cnn.DeviceSplit.place(data.train, data, "standardize", jax.devices()[0])
step = jax.jit(cnn.train_step)
for epoch in range(30):
    order = cnn.epoch_order(jax.random.key(1), epoch, len(data.train))
    for index in order.reshape(-1, 16):
        state, metrics = step(state, train.take(index))
assert cnn.evaluate(state, train).accuracy > 0.9
"""
    )
