"""JAX's settings during a run.

The meaning of a seed must not depend on environment variables or on settings of the calling
program. A setting that makes JAX strict, which a project may want for its own code, must not end a
run. Settings that only change how numbers are rounded stay as the user chose them;
`cnn.runtime.environment` records them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import flax
import jax

# JAX option -> its value during a run. `jax.config` declares options at run time, unseen by type
# checkers.
PINNED = {
    # Which random numbers follow from a key, and the default types of numbers.
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    # Other settings by which JAX refuses or rewrites a program.
    "jax_numpy_rank_promotion": "allow",
    "jax_legacy_prng_key": "allow",
    "jax_debug_key_reuse": False,
    "jax_debug_nans": False,  # a run finds such numbers itself, and stops or skips the step
    "jax_debug_infs": False,
    "jax_default_device": None,
    "jax_transfer_guard": "allow",
    "jax_no_tracing": False,
    "jax_no_execution": False,
}

# JAX has no context managers for these, so during a run they hold in all threads.
_UPDATED = {
    # Checks of the values of arrays, which fail for arrays on several devices.
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    # A failure of the cache of compiled programs costs a compilation, not a run.
    "jax_raise_persistent_cache_errors": False,
    "jax_compilation_cache_check_contents": False,
}


@contextlib.contextmanager
def pinned_settings() -> Iterator[None]:
    """Within it, in this thread, JAX's settings are those of `PINNED`, and `jit` compiles.

    Afterwards they are as before.

    >>> with jax.enable_x64(True):
    ...     with pinned_settings():
    ...         print(jax.numpy.zeros(1).dtype)
    float32
    """
    with contextlib.ExitStack() as settings:
        for name, value in PINNED.items():
            # A version of JAX without this setting behaves like its value here.
            if (setting := getattr(jax, name.removeprefix("jax_"), None)) is not None:
                settings.enter_context(setting(value))
        settings.enter_context(jax.disable_jit(False))
        for name, value in _UPDATED.items():
            if hasattr(jax.config, name):
                settings.callback(jax.config.update, name, getattr(jax.config, name))
                jax.config.update(name, value)
        # It decides how Flax derives the key of a parameter from the names of its modules.
        separator = "fix_rng_separator"
        if hasattr(flax.config, f"flax_{separator}"):
            flag = flax.config.temp_flip_flag(separator, False)
            settings.enter_context(flag)
        yield
