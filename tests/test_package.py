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
