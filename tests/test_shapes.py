"""The shapes in the annotations of the public functions are those that the functions have."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import TypeCheckError, jaxtyped

import cnn
from tests import typecheck

MODEL = cnn.CNN(4, features=(4,), hidden_features=8)
KEY = jax.random.key(0)


def checked(fn):
    return jaxtyped(typechecker=typecheck)(fn)


def test_predict_step():
    state = cnn.create_train_state(MODEL, optax.sgd(0.1), KEY, (8, 8, 3))
    predict = checked(cnn.predict_step)
    assert predict(state, jnp.zeros((2, 8, 8, 3))).shape == (2, 4)
    with pytest.raises(TypeCheckError):
        predict(state, jnp.zeros((2, 8, 8, 3), jnp.uint8))


def test_normalize():
    normalize = checked(cnn.normalize)
    assert normalize(jnp.zeros((5, 2, 2, 3), jnp.uint8), jnp.zeros(3), jnp.ones(3)).shape[0] == 5
    with pytest.raises(TypeCheckError):
        normalize(jnp.zeros((2, 2, 3), jnp.uint8), jnp.zeros(1), jnp.ones(3))
    with pytest.raises(TypeCheckError):
        normalize(jnp.zeros((2, 2, 3)), jnp.zeros(3), jnp.ones(3))


def test_epoch_permutation():
    assert checked(cnn.epoch_permutation)(KEY, 0, 7).shape == (7,)


def test_losses_and_augmentations_are_checked_in_every_test():
    """By the import hook that pyproject.toml installs."""
    with pytest.raises(TypeCheckError):
        cnn.CrossEntropy()(jnp.zeros((2, 4)), jnp.zeros(3, int))
    with pytest.raises(TypeCheckError):
        cnn.create_augment(flip=True)(KEY, jnp.zeros((2, 8, 8), jnp.uint8))
