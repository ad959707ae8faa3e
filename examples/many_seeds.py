"""Trains one network from several seeds side by side: mean, deviation and interval over seeds.

    python examples/many_seeds.py --num-seeds 5

A run is a pure function of its key, which draws the weights and the order of the images. So
`jax.vmap` over keys makes one program of all runs. The data are scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import cnn
from cnn.runtime import cli
from cnn.statistics import spread

BATCH_SIZE = 32
LEARNING_RATE = 2e-3


def create_state(data: cnn.Dataset, num_epochs: int, key: jax.Array) -> cnn.TrainState:
    """The network of one seed before its first step."""
    model = cnn.CNN(data.num_classes, padding="SAME")
    num_steps = num_epochs * (len(data.train) // BATCH_SIZE)
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
    return cnn.create_train_state(model, tx, key, data.image_shape)


def train_epoch(
    split: cnn.DeviceSplit, state: cnn.TrainState, key: jax.Array
) -> tuple[cnn.TrainState, cnn.Metrics]:
    """An epoch of one seed; the images that fill no batch are left out."""
    num_images = len(split.labels)
    num_steps = num_images // BATCH_SIZE
    order = cnn.epoch_permutation(key, state.step // num_steps, num_images)

    def step(state: cnn.TrainState, index: jax.Array) -> tuple[cnn.TrainState, cnn.Metrics]:
        return cnn.train_step(state, split.get_batch(index))

    return jax.lax.scan(step, state, order[: num_steps * BATCH_SIZE].reshape(-1, BATCH_SIZE))


def score(split: cnn.DeviceSplit, state: cnn.TrainState) -> cnn.Metrics:
    """The metrics of one seed, on all images at once; of a larger split score parts and add up."""
    return cnn.eval_step(state, split.get_batch(jnp.arange(len(split.labels))))


def over_seeds(layout: str, of_one: Callable[..., Any]) -> Callable[..., Any]:
    """From a function (split, ...) of one seed to one of arguments with a leading axis of seeds."""
    # "vmap" makes each operation one of all seeds. That is for a GPU or TPU, which a small network
    # by itself leaves mostly idle. A CPU is busy with one seed: there "map", one after the other,
    # is better. An epoch of digits with 5 seeds took 1.25 times as much processor time with "vmap"
    # (1.20 to 1.31, quartiles of 40 rounds in turns, on 2 shared cores of an AMD EPYC).
    if layout == "vmap":
        return jax.jit(lambda split, *each: jax.vmap(lambda *one: of_one(split, *one))(*each))
    return jax.jit(lambda split, *each: jax.lax.map(lambda one: of_one(split, *one), each))


def train_seeds(
    data: cnn.Dataset, seeds: Sequence[int], num_epochs: int, layout: str
) -> tuple[cnn.TrainState, jax.Array]:
    """The final states and their test accuracies, both with a leading axis of seeds."""
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    # Two keys of each: no random number may serve twice.
    init_keys, order_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    train, test = map(cnn.DeviceSplit.from_split, (data.train, data.test))
    train_all, score_all = over_seeds(layout, train_epoch), over_seeds(layout, score)
    states = jax.vmap(lambda key: create_state(data, num_epochs, key))(init_keys)
    for epoch in range(num_epochs):
        states, _ = train_all(train, states, order_keys)
        metrics = score_all(test, states)
        accuracies = metrics.sums["accuracy"] / metrics.count
        print(f"epoch {epoch + 1}: {' '.join(f'{one:.1%}' for one in accuracies.tolist())}")
    return states, accuracies


def main(argv: list[str]) -> None:
    """Flags -> seeds -> mean, standard deviation and Student's interval."""
    parser = cli.Parser("python examples/many_seeds.py", __doc__)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--layout", choices=("vmap", "map"), default="vmap", help="choose map on a CPU"
    )
    arguments = parser.parse_args(argv)
    n = arguments.num_seeds
    if n < 2 or arguments.epochs < 1:
        parser.error("an interval needs --num-seeds of 2 or more and --epochs of 1 or more")
    data = cnn.load_dataset("digits")
    _, accuracies = train_seeds(data, range(n), arguments.epochs, arguments.layout)
    found = spread(accuracies.tolist())
    assert found.interval is not None
    low, high = found.interval
    print(
        f"test accuracy {found.mean:.2%} ± {found.std:.2%} ({n} seeds); "
        f"95 % interval of the mean: {low:.2%} to {high:.2%}"
    )


if __name__ == "__main__":
    cli.run(main, interrupted="nothing is saved")
