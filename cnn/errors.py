"""The exceptions that carry a message for the user, and texts in such messages."""

from __future__ import annotations

from typing import Any


def one_line(text: str, limit: int = 1000) -> str:
    r"""Makes a text fit for a message: escapes control characters, and cuts the middle if long.

    >>> print(one_line("two\nlines"))
    two\nlines
    >>> one_line("0123456789", limit=4)
    '01 ... 89'
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = limit // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"


def number_of(count: int, noun: str, plural: str = "") -> str:
    """A number and a noun.

    >>> number_of(1, "file"), number_of(1000, "file"), number_of(2, "class", "classes")
    ('1 file', '1,000 files', '2 classes')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def array_type(value: Any) -> str:
    """Dtype and shape of an array of any library; the name of the type of anything else.

    >>> import numpy as np
    >>> array_type(np.zeros((2, 3), np.float32)), array_type(None)
    ('float32[2, 3]', 'NoneType')
    """
    if not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{getattr(value.dtype, 'name', value.dtype)}{list(value.shape)}"


class UserError(ValueError):
    """An error that the user can correct: in a flag, a config, a dataset or a directory.

    The message is one line: what is wrong, where, and what to do. `train.py` prints it and exits
    with code 2. A script may catch it as a `ValueError`.

    Args:
      message: control characters in it are escaped; a long message is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; the same command resumes it from its last checkpoint.

    `train.py` exits with code 128 + `signal`: 130 after Ctrl-C, 143 after SIGTERM. A script that
    catches `KeyboardInterrupt` catches it too.

    Args:
      message: one line that names the step that was saved.
      signum: the signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signal = signum
