"""The exceptions that say something to the person at the screen."""


def one_line(text: str, limit: int = 1000) -> str:
    r"""A text as it can stand in a message: control characters escaped, the middle cut if long.

    >>> print(one_line("two\nlines"))
    two\nlines
    >>> one_line("0123456789", limit=4)
    '01 ... 89'
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = limit // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"


class UserError(ValueError):
    """A mistake in a flag, a config, a dataset or a directory.

    Its message is one line for a person: what is wrong, where, and what to do.
    `train.py` prints that line and leaves with exit code 2; a script may catch it
    as the `ValueError` it is.

    Args:
      message: control characters in it are escaped, and it is cut in the middle if it is long.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


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
