"""JAX's random keys without JAX: a program for a single key takes a tenth of a second to compile.

(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.1: Threefry-2x32 of 20
rounds.)
"""

from __future__ import annotations

_MASK = 2**32 - 1
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def fold_in(key: tuple[int, int], number: int) -> tuple[int, int]:
    """The words of `jax.random.fold_in(key, number)` for a key of "threefry2x32".

    Args:
      key: its two words, 0 to 2**32 - 1.
      number: 0 to 2**32 - 1.

    >>> fold_in((0, 7), 1)
    (195045567, 4062205631)
    """
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = key[0], (number + key[1]) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = (x + y) & _MASK
            y = ((y << rotation | y >> (32 - rotation)) & _MASK) ^ x
        x = (x + schedule[(group + 1) % 3]) & _MASK
        y = (y + schedule[(group + 2) % 3] + group + 1) & _MASK
    return x, y
