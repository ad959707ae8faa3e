"""The type of arrays that functions take: JAX's and NumPy's."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
