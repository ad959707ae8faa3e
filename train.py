"""Trains an image classifier: on CIFAR-10, or as another config says.

The same command again resumes the run, or says that it is finished.
"""

import contextlib
import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or a closed one
        if sys.stdout.isatty():
            print("importing JAX ...", end="\r", flush=True)  # the first line of the run covers it
    gc.disable()  # modules are no garbage: looking for it in them takes a sixth of their time
try:
    from cnn.command_line import parse
    from cnn.groups import train_group
    from cnn.members import is_group
    from cnn.runtime import cli
    from cnn.runtime.screen import log
    from cnn.runtime.signals import raise_on_signals
    from cnn.training import train_and_evaluate
except KeyboardInterrupt:
    sys.exit(130)
except ValueError as error:  # JAX and others read environment variables when they are imported
    named = " named JAX_..." if "jax" in str(error).lower() else ""
    print(f"error: {error}; look at the environment variables{named}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    """Flags -> config -> `train_and_evaluate`, or `train_group` for several seeds or a sweep."""
    raise_on_signals()
    run = parse(argv, __doc__, home=Path(__file__).resolve().parent)
    train = train_group if is_group(run.config) else train_and_evaluate
    train(run.config, run.workdir)
    log(run.next_commands())


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    cli.run(main)
