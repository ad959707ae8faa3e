"""Training on the images that a proxy network finds hardest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cnn
from cnn import UserError, train_and_evaluate, train_step
from cnn.losses import CrossEntropy
from cnn.runtime.leaves import digest
from cnn.selection import hardest_images
from configs import digits

SHAPE = (4, 4, 1)


class Norm(nn.Module):
    """A dense layer after batch normalization: it has running statistics."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.BatchNorm(use_running_average=not train, use_scale=False)(image)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def batch():
    key = jax.random.key(0)
    return {
        "image": jax.random.normal(key, (12, *SHAPE)),
        "label": jnp.arange(12) % 3,
        "place": jnp.arange(12),
    }


def choose(keep=4, update_every=3, loss_fn=CrossEntropy(reduction="sum")):
    tx = optax.sgd(0.1, momentum=0.9)
    return hardest_images(
        Norm(), tx, jax.random.key(1), SHAPE, keep=keep, update_every=update_every, loss_fn=loss_fn
    )


def losses_and_gradient(params, batch, index):
    def total(params):
        variables = {"params": params, "batch_stats": {"BatchNorm_0": {}}}
        logits, _ = Norm().apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        losses = CrossEntropy()(logits, batch["label"])
        return losses[index].sum(), losses

    (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params)
    return losses, grads


def test_the_images_with_the_largest_losses_are_kept_in_their_order(batch):
    selection, proxy = choose()
    losses, _ = losses_and_gradient(proxy["params"], batch, jnp.arange(12))
    _, kept = jax.jit(selection)(proxy, batch, jnp.int32(1), jax.random.key(0))
    hardest = np.sort(np.argsort(losses)[-4:])
    assert kept["place"].tolist() == hardest.tolist()
    np.testing.assert_array_equal(kept["image"], batch["image"][hardest])


def test_the_proxy_learns_from_what_it_keeps_at_every_third_step(batch):
    selection, proxy = choose()
    select = jax.jit(selection)
    for step in range(5):
        before = proxy
        proxy, kept = select(proxy, batch, jnp.int32(step), jax.random.key(0))
        # The running statistics follow every batch.
        assert digest(proxy["model_state"]) != digest(before["model_state"])
        if step % 3:
            assert digest(proxy["params"]) == digest(before["params"])
            assert digest(proxy["opt_state"]) == digest(before["opt_state"])
    _, grads = losses_and_gradient(before["params"], batch, kept["place"])
    after, _ = select(before, batch, jnp.int32(6), jax.random.key(0))
    trace = jax.tree.leaves(before["opt_state"])
    moved = jax.tree.map(lambda new, old: new - old, after["params"], before["params"])
    for step, grad, old in zip(*map(jax.tree.leaves, (moved, grads)), trace, strict=True):
        np.testing.assert_allclose(step, -0.1 * (grad + 0.9 * old), rtol=1e-4, atol=1e-6)


def test_a_step_trains_on_the_kept_images_alone(batch):
    selection, proxy = choose()
    state = cnn.create_train_state(Norm(), optax.sgd(0.1), jax.random.key(2), SHAPE)
    _, kept = jax.jit(selection)(proxy, batch, jnp.int32(0), state.key)
    step = jax.jit(train_step)
    alone, _ = step(state, {"image": kept["image"], "label": kept["label"]})
    state, metrics = step(state.replace(selection=selection, proxy=proxy), batch)
    assert int(metrics.count) == 4
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, alone.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert digest(state.proxy) != digest(proxy)
    assert "proxy" in state.arrays


def test_a_batch_that_is_too_small_is_refused(batch):
    selection, proxy = choose(keep=13)
    with pytest.raises(UserError, match="13 is more than the 12 images"):
        selection(proxy, batch, jnp.int32(0), jax.random.key(0))
    with pytest.raises(UserError, match="update_every=0 must be 1 or more"):
        choose(update_every=0)


def config(**proxy):
    config = digits.get_config()
    config.num_epochs, config.batch_size = 2, 120
    config.model.features, config.model.hidden_features = (4,), 0
    config.model.padding = "SAME"
    config.proxy = type(config)({**config.model.to_dict(), "keep": 40, "update_every": 2, **proxy})
    config.runtime.checkpoint_every_steps = 5
    return config


def test_a_run_with_a_proxy_resumes_with_the_same_bits(tmp_path):
    whole, result = train_and_evaluate(config(), tmp_path / "whole")
    assert result["num_steps"] == 22
    assert '"skipped_steps": 0' in (tmp_path / "whole" / "metrics.jsonl").read_text()

    def stop(*_):
        raise RuntimeError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cnn.ledger.Ledger._write", stop
        )  # after step 11; the checkpoint is of step 10
        with pytest.raises(RuntimeError, match="stopped"):
            train_and_evaluate(config(), tmp_path / "part")
    resumed, again = train_and_evaluate(config(), tmp_path / "part")
    assert again["digest"] == result["digest"]
    assert digest(resumed.proxy) == digest(whole.proxy)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ({"keep": 0}, "proxy.keep=0 must lie between 1 and batch_size=120"),
        ({"keep": 121}, "proxy.keep=121"),
        ({"features": (0,)}, "features"),
        ({"width": 3}, "unknown config field proxy.width"),
    ],
)
def test_an_impossible_proxy_is_refused(tmp_path, proxy, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config(**proxy), tmp_path / "run")
    assert not (tmp_path / "run").exists()
