"""A run as a trained model: its weights, its class names, and predictions for images.

The run directory is all that this needs: neither the dataset nor the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cnn.averaging import evaluated_network
from cnn.data.dataset import Split
from cnn.data.images import describe_fault, to_array
from cnn.data.pipeline import DeviceSplit
from cnn.errors import UserError, array_type
from cnn.evaluation import predict
from cnn.losses import LossFn, create_loss, evaluation_loss, probabilities
from cnn.metrics import find_metrics
from cnn.models import create_model
from cnn.runtime import leaves
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.devices import data_mesh, replicated_sharding, select_devices
from cnn.runtime.run_directory import RunDirectory
from cnn.steps import TrainState, initialize, is_per_example_state, static_arguments

_IMAGES_PER_CALL = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A checkpoint of a run, ready to classify images; `load_run` makes it.

    Attributes:
      path: the run directory.
      step: of the checkpoint.
      config: of the run, with all fields, as JSON values.
      dataset: what the run was trained on, as `dataset.json` has it.
      record: what the checkpoint holds beside the weights.
      model: the linen module.
      state: a train state without optimizer, for `evaluate` and `predict_step`. Its weights are
        the averaged ones where the run scored these.
      mesh: the devices that hold the weights.
    """

    path: Path
    step: int
    config: dict[str, Any]
    dataset: dict[str, Any]
    record: dict[str, Any]
    model: nn.Module
    state: TrainState
    mesh: Mesh

    @property
    def variables(self) -> dict[str, Any]:
        """The parameters and other collections, for `model.apply`."""
        return self.state.variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return tuple(self.dataset["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the model takes."""
        height, width, channels = self.dataset["image_shape"]
        return height, width, channels

    @property
    def normalization(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std, `float32[C]`: the model is given (pixel / 255 - mean) / std."""
        channels = self.image_shape[-1]
        if self.dataset["normalization"] == "scale":
            return np.zeros(channels, np.float32), np.ones(channels, np.float32)
        mean, std = (np.array(self.dataset[name], np.float32) for name in ("mean", "std"))
        return mean, np.where(std > 0, std, np.float32(1))

    def predict(self, images: Any, *, tta: str = "none") -> np.ndarray:
        """The probabilities of the classes, `float32[N, K]`; see `logits` for the arguments.

        They are the softmax of the logits, or what the loss of the run declares in its place.
        """
        logits = self.logits(images, tta=tta)
        return np.asarray(probabilities(self.state.loss_fn, jnp.asarray(logits)))

    def logits(self, images: Any, *, tta: str = "none") -> np.ndarray:
        """What the model returns, `float32[N, K]`.

        Args:
          images: uint8[N, H, W, C] of `image_shape`; or a sequence of Pillow images and arrays
            uint8[H, W] or uint8[H, W, C], of any size and colour mode: they are resized as the
            images of the run were. One such image alone is a batch of one. For a model of another
            number of channels, arrays of one channel are grey, of two grey and opacity, of three
            RGB and of four RGB and opacity; what is transparent is shown over white.
          tta: test-time augmentation, a key of `cnn.evaluation.TEST_TIME_VIEWS`.

        Raises:
          UserError: the images are something else, or one of them cannot be decoded.
        """
        pixels = self._pixels(images)
        if not len(pixels):
            return np.zeros((0, len(self.class_names)), np.float32)
        mean, std = self.normalization
        parts = []
        for start in range(0, len(pixels), _IMAGES_PER_CALL):
            chunk = pixels[start : start + _IMAGES_PER_CALL]
            filled = _filled(chunk) if is_per_example_state(self.state) else chunk
            split = Split(filled, np.zeros(len(filled), np.int32))
            placed = DeviceSplit.from_split(
                split, replicated_sharding(self.mesh), mean=mean, std=std
            )
            logits = predict(self.state, placed, batch_size=_IMAGES_PER_CALL, tta=tta)
            parts.append(logits[: len(chunk)])
        return np.concatenate(parts)

    def _pixels(self, images: Any) -> np.ndarray:
        """uint8[N, H, W, C] of `image_shape`."""
        import PIL.Image  # not needed by every script

        if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
            images = np.asarray(images)
            if images.dtype == np.uint8 and images.shape[1:] == self.image_shape:
                return images
        if isinstance(images, PIL.Image.Image) or getattr(images, "ndim", 4) in (2, 3):
            images = [images]
        if not isinstance(images, Sequence | np.ndarray | jax.Array) or isinstance(images, str):
            raise _wrong(images, self.image_shape)
        pixels = [self._one(image, place) for place, image in enumerate(images)]
        return np.stack(pixels) if pixels else np.zeros((0, *self.image_shape), np.uint8)

    def _one(self, image: Any, place: int) -> np.ndarray:
        """The pixels of an image, which has a place in the sequence."""
        import PIL.Image

        if not isinstance(image, PIL.Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim not in (2, 3):
                raise _wrong(image, self.image_shape, place)
            array = array[..., 0] if array.shape[2:] == (1,) else array
            try:
                image = PIL.Image.fromarray(array)
            except (TypeError, ValueError) as error:
                raise _wrong(image, self.image_shape, place) from error
        *size, channels = self.image_shape
        resize = self.dataset["resize"]
        try:
            return to_array(image, size=(size[0], size[1]), channels=channels, resize=resize)
        except Exception as error:  # Pillow decodes only now, and raises errors of any type
            file = getattr(image, "filename", None)
            name = f"images[{place}]" + (f" ({os.fsdecode(file)})" if file else "")
            raise UserError(
                f"{name} cannot be read: {describe_fault(error)}; replace it or leave it out"
            ) from error


def _wrong(images: Any, shape: tuple[int, int, int], place: int | None = None) -> UserError:
    at = "" if place is None else f" (images[{place}])"
    what = type(images).__name__ if isinstance(images, str | os.PathLike) else array_type(images)
    return UserError(
        f"images must be uint8 arrays (N, H, W, C) such as (N, {', '.join(map(str, shape))}), or a "
        f"list of Pillow images or of uint8 arrays (H, W, C), not {what}{at}"
    )


def _filled(images: np.ndarray) -> np.ndarray:
    """With copies of the last up to a power of two, so that few batch sizes are compiled."""
    size = 1 << (len(images) - 1).bit_length()
    return np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])


def load_run(
    path: str | os.PathLike[str],
    checkpoint: str | int = "latest",
    *,
    model: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    platform: str = "auto",
) -> TrainedModel:
    """Loads a trained model from a run directory, on any machine.

        run = cnn.load_run("checkpoints/digits")
        probabilities = run.predict([PIL.Image.open("seven.png")])
        print(run.class_names[probabilities[0].argmax()])

    Args:
      path: the run directory.
      checkpoint: "latest", "best" (by test accuracy) or a step.
      model: the module, if the run was trained with one that a script passed.
      loss_fn: likewise; without it such a run is scored with cross-entropy.
      platform: as `config.runtime.platform`.

    Raises:
      UserError: there is no such run or checkpoint, it is damaged or of another version of cnn,
        or it was trained with a model that was not passed, or with another.
    """
    run = RunDirectory(path)
    step = find_checkpoint(run, checkpoint)
    arrays, record = _read(CheckpointManager(run.checkpoints), step)
    config, dataset = record.get("config"), record.get("dataset")
    if not isinstance(config, dict) or not isinstance(dataset, dict):
        raise UserError(f"{run.path} is not a run of train_and_evaluate of this version of cnn")
    if model is None:
        if "object" in config["model"]:
            raise UserError(
                f"{run.path} was trained with the model {config['model']['object']}, which a "
                f"script passed: pass it to load_run(..., model=...)"
            )
        model = create_model(num_classes=len(dataset["class_names"]), **config["model"])
    if loss_fn is None:
        known = config["loss"] if "object" not in config["loss"] else {"name": "cross_entropy"}
        loss_fn = create_loss(**known)
    mesh = data_mesh(devices := select_devices(platform), len(devices))
    shape = tuple(dataset["image_shape"])
    static = static_arguments(
        model, optax.identity(), shape, evaluation_loss(loss_fn), find_metrics(config["metrics"])
    )
    fresh = jax.eval_shape(functools.partial(initialize, **static), jax.random.key(0))
    wanted = {"params": fresh.params, "model_state": fresh.model_state}
    network = evaluated_network(arrays, config.get("averaging", {}))
    if wrong := leaves.differences(network, wanted):
        raise UserError(
            f"checkpoint {step} of {run.path} is of another model "
            f"({leaves.first_of(wrong.values())})"
        )
    stored = leaves.by_path(network)
    values = [jnp.asarray(stored[path]) for path in leaves.by_path(wanted)]
    variables = jax.tree.unflatten(jax.tree.structure(wanted), values)
    state = fresh.replace(
        step=jnp.asarray(arrays["step"]), key=jax.random.key(0), opt_state=(), **variables
    )
    return TrainedModel(
        path=run.path,
        step=step,
        config=config,
        dataset=dataset,
        record=record,
        model=model,
        state=jax.device_put(state, replicated_sharding(mesh)),
        mesh=mesh,
    )


def _read(checkpoints: CheckpointManager, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and record of a checkpoint; if it cannot be read, the error names the others."""
    try:
        return checkpoints.read(step)
    except UserError as error:
        others = [other for other in checkpoints.all_steps() if other != step]
        if not others:
            raise
        raise UserError(
            f"{error}; choose another of the run: --checkpoint {others[-1]}, or in Python "
            f"load_run(path, {others[-1]}); there are {', '.join(map(str, others))}"
        ) from error


def find_checkpoint(run: RunDirectory, checkpoint: str | int) -> int:
    """The step of a checkpoint of a run.

    Args:
      run: its directory.
      checkpoint: "latest", "best" or a step, also as text.

    Raises:
      UserError: there is no such checkpoint, or the directory is not that of a run.
    """
    checkpoints = CheckpointManager(run.checkpoints)
    steps = checkpoints.all_steps()
    if not steps:
        run.check_is_one()
        inside = next((p for p in run.path.parents if (p / "config.json").exists()), None)
        hint = f"did you mean {inside}?" if inside else "give the directory that train.py printed"
        raise UserError(f"{run.path} is not a run directory: no checkpoint is in it; {hint}")
    if checkpoint == "latest":
        return steps[-1]
    if checkpoint == "best":
        # Without an accuracy (saved within the first epoch) the latest is as good as any.
        return steps[-1] if (best := checkpoints.best_step()) is None else best
    if str(checkpoint).isdecimal() and int(checkpoint) in steps:
        return int(checkpoint)
    raise UserError(
        f"{run.path} has no checkpoint {checkpoint!r}; there are {', '.join(map(str, steps))}, and "
        f"latest and best"
    )
