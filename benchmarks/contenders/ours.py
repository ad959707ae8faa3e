"""This repository's public API, used as the README says for a script of one's own."""

from __future__ import annotations

import flax.linen as nn
import jax

import cnn
from cnn import layers
from contenders import problem as shared
from contenders.flax_networks import JaxProgram, Net94, optimizer


def _model(network: str) -> nn.Module:
    if network == "seed":
        return cnn.CNN(shared.NUM_CLASSES)
    return Net94(
        conv=layers.conv_general_dilated,
        conv_max_pool=layers.conv_max_pool,
        max_pool=layers.max_pool,
    )


def program(problem: shared.Problem) -> JaxProgram:
    """The batch sharded over one device per core, the state on each, a plain `jax.jit`."""
    cnn.prepare_cpu()
    mesh = cnn.batch_mesh(jax.devices(), problem.images.shape[1])
    state = cnn.create_train_state(
        _model(problem.network),
        optimizer(problem.network),
        jax.random.key(0),
        shared.IMAGE_SHAPE,
    ).replace(params=problem.weights)
    train_step = jax.jit(cnn.train_step, donate_argnums=0)

    def step(
        state: cnn.TrainState, image: jax.Array, label: jax.Array
    ) -> tuple[cnn.TrainState, cnn.Metrics]:
        return train_step(state, {"image": image, "label": label})

    return JaxProgram(
        initial=jax.device_put(state, cnn.replicated(mesh)),
        step=step,
        loss=lambda metrics: metrics.loss,
        forward=jax.jit(cnn.predict_step),
        images=[jax.device_put(image, cnn.sharded(mesh)) for image in problem.images],
        labels=[jax.device_put(label, cnn.sharded(mesh)) for label in problem.labels],
        settle=cnn.stay_close,
    )
