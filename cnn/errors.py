"""The one exception that means: what was given is wrong, not the program."""


class InputError(ValueError):
    """A mistake in a flag, a config, a dataset or a directory.

    Its message is one line for a person: what is wrong, where, and what to do.
    `train.py` prints that line and leaves with exit code 2; a script may catch it
    as the `ValueError` it is.
    """
