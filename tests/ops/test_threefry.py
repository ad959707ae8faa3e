"""Keys without JAX are those of JAX."""

from typing import Any

import jax
import numpy as np

from cnn.ops import threefry


def test_a_folded_key_is_that_of_jax():
    for words, number in [((0, 7), 1), ((2**32 - 1, 3), 2**32 - 1), ((5, 2**31), 0)]:
        data: Any = np.array(words, np.uint32)
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        expected = jax.random.key_data(jax.random.fold_in(key, np.uint32(number)))
        assert threefry.fold_in(words, number) == tuple(expected.tolist())
