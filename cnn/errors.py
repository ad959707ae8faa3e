"""The exceptions that say something to the person at the screen."""


class InputError(ValueError):
    """A mistake in a flag, a config, a dataset or a directory.

    Its message is one line for a person: what is wrong, where, and what to do.
    `train.py` prints that line and leaves with exit code 2; a script may catch it
    as the `ValueError` it is.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended a run. What it had saved is there, and the same command goes on from it.

    Its message is one line for a person. `train.py` leaves with exit code 128 + `signal`: 130
    after Ctrl-C, 143 after SIGTERM. A script that catches `KeyboardInterrupt` catches it too.

    Args:
      message: what was saved.
      signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signal = signum
