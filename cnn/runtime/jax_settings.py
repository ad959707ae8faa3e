"""JAX's settings during a run.

What a seed means must not depend on the variables of the shell or on what the calling program has
set, and a setting that makes JAX strict, which a project may want for its own code, must not end a
run of this one. Settings that only change how numbers are rounded stay as the user chose them:
`cnn.runtime.environment` records them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import flax
import jax

# The JAX option from which a script reads each setting -> its value during a run. Options are read
# through `jax.config`, which declares them at run time, unseen by type checkers.
PINNED = {
    # Which random numbers follow from a key, and of which type numbers are by default.
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    # What else makes JAX refuse or rewrite a program.
    "jax_numpy_rank_promotion": "allow",
    "jax_legacy_prng_key": "allow",
    "jax_debug_key_reuse": False,
    "jax_debug_nans": False,  # a run stops at such numbers by itself, or leaves the step out
    "jax_debug_infs": False,
    "jax_default_device": None,
    "jax_transfer_guard": "allow",
    "jax_no_tracing": False,
    "jax_no_execution": False,
}

# JAX has no context managers for these: within a run they hold in all threads.
_UPDATED = {
    # Checks of its arrays' values, which fail where arrays lie on several devices.
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    # What the cache of compiled functions cannot do costs a compilation, not a run.
    "jax_raise_persistent_cache_errors": False,
    "jax_compilation_cache_check_contents": False,
}


@contextlib.contextmanager
def pinned_settings() -> Iterator[None]:
    """Within it, in this thread, JAX's settings are those of `PINNED`, and `jit` compiles.

    Afterwards they are what they were before.

    >>> with jax.enable_x64(True):
    ...     with pinned_settings():
    ...         print(jax.numpy.zeros(1).dtype)
    float32
    """
    with contextlib.ExitStack() as settings:
        for name, value in PINNED.items():
            # A version of JAX that has no such setting has no other behaviour either.
            if (setting := getattr(jax, name.removeprefix("jax_"), None)) is not None:
                settings.enter_context(setting(value))
        settings.enter_context(jax.disable_jit(False))
        for name, value in _UPDATED.items():
            if hasattr(jax.config, name):
                settings.callback(jax.config.update, name, getattr(jax.config, name))
                jax.config.update(name, value)
        # It decides how Flax derives the key of each parameter from the names above it.
        separator = "fix_rng_separator"
        if hasattr(flax.config, f"flax_{separator}"):
            flag = flax.config.temp_flip_flag(separator, False)
            settings.enter_context(flag)
        yield
