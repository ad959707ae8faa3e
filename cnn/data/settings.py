"""How images become arrays: their size, and the part that is set aside for testing."""

from __future__ import annotations

import dataclasses
from typing import Any

from cnn.data.holdout import check_split
from cnn.data.images import RESIZE, parse_image_size
from cnn.errors import UserError

TEST_FRACTION = 0.2


def option(name: str, value: object) -> str:
    """How to set an argument of `load_folder` and `load_dataset`, in Python and by flags.

    >>> option("image_size", 64)  # doctest: +NORMALIZE_WHITESPACE
    'image_size=64 (--config.dataset.image_size=64 of train.py, --image-size 64 of
    data show)'
    """
    flag = name.replace("_", "-")
    return (
        f"{name}={value} (--config.dataset.{name}={value} of train.py, --{flag} {value} of data "
        f"show)"
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a person may choose; the meaning is that of the arguments of `load_dataset`.

    Attributes:
      size: height and width; None keeps those that the images have.
      resize: "crop" or "stretch".
      test_fraction: of each class, where there is no test split.
      split_seed: of the choice.
    """

    size: tuple[int, int] | None = None
    resize: str = "crop"
    test_fraction: float = TEST_FRACTION
    split_seed: int = 0

    @classmethod
    def checked(
        cls, image_size: int | tuple[int, int], resize: str, test_fraction: float, split_seed: int
    ) -> Settings:
        """The settings that arguments ask for.

        Raises:
          UserError: an argument is wrong.
        """
        size = parse_image_size(image_size)
        if resize not in RESIZE:
            raise UserError(f"resize={resize!r} must be one of {', '.join(RESIZE)}")
        check_split(test_fraction, split_seed)
        return cls(size, resize if size else "crop", float(test_fraction), int(split_seed))

    def unused(self) -> list[str]:
        """The settings that have no effect where there is a test split, but were changed."""
        usual = Settings()
        values = {name: getattr(self, name) for name in ("test_fraction", "split_seed")}
        return [
            f"{name}={value}" for name, value in values.items() if value != getattr(usual, name)
        ]

    def as_json(self) -> tuple[Any, ...]:
        """A name for them among the arrays of one dataset; () is that of the defaults."""
        if self == Settings():
            return ()
        size = None if self.size is None else list(self.size)
        return (size, self.resize, self.test_fraction, self.split_seed)
