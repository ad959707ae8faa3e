"""Trains an image classifier: on CIFAR-10 as in configs/baseline.py, or as another config says.

The same command again continues the run, or says that it is finished.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

try:
    from jax.errors import JaxRuntimeError

    from cnn.config import load_config, override, overrides_help
    from cnn.errors import InputError, Interrupted, one_line
    from cnn.interruption import raise_on_signals
    from cnn.streams import lenient_streams
    from cnn.training import train_and_evaluate
except KeyboardInterrupt:
    sys.exit(130)
except ValueError as error:  # JAX and others read their variables as they are imported
    named = " named JAX_..." if "jax" in str(error).lower() else ""
    print(f"error: {error}; look at the environment variables{named}", file=sys.stderr)
    sys.exit(2)

_HERE = Path(__file__).resolve().parent
_EXAMPLES = """examples:
  python train.py --config configs/digits.py     under a minute, nothing to download
  python train.py --config configs/baseline.py --config.batch_size=128 --config.seed=1
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; python train.py --help lists the flags")


def main(argv: list[str]) -> None:
    """Flags -> config -> `train_and_evaluate`."""
    parser = _Parser(
        prog="train.py",
        description=__doc__,
        epilog=f"{_EXAMPLES}\n{overrides_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=_HERE / "configs" / "baseline.py",
        metavar="FILE",
        help="a Python file with a get_config() function (default: configs/baseline.py)",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run directory (default: checkpoints/<config name>/ beside train.py)",
    )
    flags, rest = parser.parse_known_args(argv)
    config = override(load_config(flags.config), rest)
    if flags.workdir == "":
        parser.error("--workdir is empty")
    try:
        train_and_evaluate(config, flags.workdir or _HERE / "checkpoints" / flags.config.stem)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"not enough memory ({str(error).splitlines()[0]}); choose a smaller batch_size, "
            f"eval_batch_size or model"
        ) from error


def _hush(unraisable: "sys.UnraisableHookArgs") -> None:
    """Silent on writes that outlive the failed save they are part of.

    TensorStore, which writes for Orbax, tells of each to an event loop that is gone.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    # Orbax and TFDS say much that is no concern of the person at the screen.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _hush
    raise_on_signals()
    with lenient_streams():
        try:
            main(sys.argv[1:])
        except (InputError, OSError) as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            print("interrupted; the same command continues the run", file=sys.stderr)
            sys.exit(130)
