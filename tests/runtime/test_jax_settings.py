"""What a seed means does not depend on what JAX's variables say."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnn
from cnn.augment import create_augment
from cnn.runtime.jax_settings import PINNED, pinned_settings
from tests.helpers import short_config

# As variables such as JAX_ENABLE_X64=1 would set them.
OTHERS = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_legacy_prng_key": "error",
    "jax_debug_key_reuse": True,
    "jax_debug_infs": True,
    "jax_disable_jit": True,
    "jax_transfer_guard": "disallow_explicit",
    "jax_error_checking_behavior_oob": "raise",
}


@contextlib.contextmanager
def set_otherwise():
    before = {name: getattr(jax.config, name) for name in OTHERS}
    try:
        for name, value in OTHERS.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_one_seed_is_one_digest_whatever_the_settings_are(tmp_path, digits):
    config = short_config()
    config.num_epochs = 1
    config.augment.flip, config.augment.translate = True, 1
    _, usual = cnn.train_and_evaluate(config, tmp_path / "usual")
    with set_otherwise():
        _, other = cnn.train_and_evaluate(config, tmp_path / "other")
        assert {name: getattr(jax.config, name) for name in OTHERS} == OTHERS
    assert other["digest"] == usual["digest"]
    assert other["test_loss"] == usual["test_loss"]


@pytest.mark.parametrize("name", PINNED)
def test_a_pinned_setting_has_its_value_within_only(name):
    before = getattr(jax.config, name)
    with pinned_settings():
        assert getattr(jax.config, name) == PINNED[name]
    assert getattr(jax.config, name) == before


def test_one_key_is_one_result_in_64_bit_mode_too():
    key = jax.random.wrap_key_data(np.array([0, 3], np.uint32), impl="threefry2x32")
    images = np.arange(20 * 8 * 8 * 3, dtype=np.uint8).reshape(20, 8, 8, 3)

    def results():
        state = cnn.create_train_state(
            cnn.CNN(10, features=(4,), padding="SAME"), optax.adam(1e-3), key, (8, 8, 3)
        )
        augmented = create_augment(flip=True, translate=2)(key, jnp.asarray(images))
        return augmented, cnn.epoch_permutation(key, 2, 1437), *jax.tree.leaves(state.params)

    usual = results()
    with jax.enable_x64(True):
        wide = results()
    for one, other in zip(usual, wide, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
