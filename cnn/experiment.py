"""From a config to the objects of a run: data, model, optimizer, and how many steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.errors import FlaxError
from jax.sharding import Mesh

from cnn.augment import Augment, create_augmentations
from cnn.augment.resizing import ProgressiveResizing, Stage, scaled_size
from cnn.averaging import Averaging, create_averaging
from cnn.data import Dataset, load_dataset, load_folder
from cnn.data.pipeline import Pipeline, stream_key
from cnn.early_stopping import early_stop
from cnn.errors import UserError, number_of
from cnn.losses import LossFn, create_loss
from cnn.metrics import MetricFn, find_metrics
from cnn.models import create_model
from cnn.models.summary import model_summary
from cnn.ops.fast_cpu import fast_cpu
from cnn.optimization import create_proxy, optimizer_arguments, run_schedule
from cnn.optimizers import create_optimizer, frozen
from cnn.plateau import plateau_scale, reduce_on_plateau
from cnn.runtime.devices import data_mesh, is_on_cpu, replicated_sharding, select_devices
from cnn.runtime.jit_once import jit_once
from cnn.runtime.provenance import describe_object
from cnn.runtime.screen import waiting
from cnn.selection import hardest_images
from cnn.steps import (
    TrainState,
    begin_averaging,
    initialize,
    predict_step,
    static_arguments,
    train_step,
)

# What a script may pass -> the config section that it replaces.
SECTIONS = {
    "model": "model",
    "tx": "optimizer",
    "loss_fn": "loss",
    "augment": "augment",
    "dataset": "dataset",
}
_INIT = 0  # the stream of random keys of the initialization; `cnn.data.pipeline` has the others


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What stays the same during a run.

    Attributes:
      config: the checked `ConfigDict`; `Any`, as no type checker knows its fields.
      dataset: its splits, on the host.
      pipeline: its batches, on the devices.
      model: the network.
      tx: the optimizer.
      loss_fn: the training objective.
      metric_fns: what is reported beside the loss.
      schedule: learning rate by number of updates; None if the optimizer came from a script.
      averaging: of the weights, if any.
      proxy: the network and the optimizer that choose which images are trained on, if any.
      num_steps: of the whole run.
      warmup_updates: during which the learning rate rises.
      num_devices: that it may use; the mesh has those that divide the batch.
      given: by config section, a description of what a script passed in its place.
    """

    config: Any
    dataset: Dataset
    pipeline: Pipeline
    model: nn.Module
    tx: optax.GradientTransformation
    loss_fn: LossFn
    metric_fns: tuple[MetricFn, ...]
    schedule: optax.Schedule | None
    averaging: Averaging | None
    proxy: tuple[nn.Module, optax.GradientTransformation] | None
    num_steps: int
    warmup_updates: int
    num_devices: int
    given: dict[str, Any]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.pipeline.mesh

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the train split."""
        return self.pipeline.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        """Images that a step is trained on: those of a batch, or those that the proxy keeps."""
        return self.config.batch_size if self.proxy is None else self.config.proxy.keep

    @property
    def dataset_record(self) -> dict[str, Any]:
        """What a model needs to know of its dataset later, as JSON values: `dataset.json`."""
        data = self.dataset
        return {
            "name": data.name,
            "class_names": list(data.class_names),
            "image_shape": list(data.image_shape),
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
            "normalization": self.config.dataset.normalization,
            "resize": self.config.dataset.resize,
            "train_count": len(data.train),
            "test_count": len(data.test),
            "fingerprint": data.fingerprint,
        }

    @property
    def _accumulation(self) -> int:
        """Steps per update."""
        return self.config.optimizer.grad_accumulation_steps if self.schedule else 1

    @property
    def freeze(self) -> tuple[str, ...]:
        """Patterns of the parameters that are not trained, as far as the config says it."""
        return self.config.optimizer.freeze if self.schedule else ()

    @property
    def num_updates(self) -> int:
        """Updates of the whole run: an optimizer that accumulates makes fewer than steps."""
        return self.num_steps // self._accumulation

    def with_seed(self, config: Any) -> Experiment:
        """The same experiment with another seed: what was compiled for this one serves it too.

        Args:
          config: checked, which differs from this one's in `seed` only.
        """
        pipeline = self.pipeline.with_seed(config.seed)
        return dataclasses.replace(self, config=config, pipeline=pipeline)

    @property
    def stages(self) -> list[Stage]:
        """The parts of the run in which the images have one size."""
        return self.pipeline.resizing.stages(self.num_steps, self.steps_per_epoch)

    def epoch(self, step: int) -> int | float:
        """Passes over the training images after some steps; whole ones as an int."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest / self.steps_per_epoch if rest else whole

    def epoch_end(self, step: int) -> int:
        """The step at which the epoch that begins or continues at a step is evaluated."""
        return min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.num_steps)

    def next_stop(self, step: int) -> int:
        """The next step after which the state is saved: within the epoch, or at its end."""
        every, end = self.config.runtime.checkpoint_every_steps, self.epoch_end(step)
        return min(end, (step // every + 1) * every) if every else end

    def early_stop(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Why the run ends before `num_steps`, after the epochs of some records; else None."""
        return early_stop(records, **self.config.early_stopping.to_dict())

    def initial_state(self) -> TrainState:
        """The state before the first step, on every device of the mesh.

        Raises:
          UserError: the model does not fit the images, whole or smaller ones, a batch of one image
            meets batch normalization, or a training step with what a script has passed cannot be
            traced.
        """
        static = self._static_arguments()
        state = self.jit_once(initialize, tuple(static))(self._initial_key, **static)
        state = begin_averaging(state.replace(params=self._from_images(self.model, state.params)))
        if self.proxy is not None:
            state = self._with_proxy(state, *self.proxy)
        self._check_batch_size(state)
        self._check_step(state)
        state = state.replace(skip_nonfinite=self.config.runtime.on_nonfinite == "skip")
        return jax.device_put(state, replicated_sharding(self.mesh))

    def initial_shapes(self) -> TrainState:
        """Shapes and dtypes of the state, of which nothing is compiled or computed.

        Raises:
          UserError: as for `initial_state`.
        """
        static = self._static_arguments()
        state = jax.eval_shape(functools.partial(initialize, **static), self._initial_key)
        self._check_batch_size(state)
        self._check_step(state)
        return state

    @property
    def _initial_key(self) -> jax.Array:
        return stream_key(self.config.seed, _INIT)

    def _from_images(self, model: Any, params: Any) -> Any:
        """The parameters of a model that wants to see training images first, after that."""
        if not hasattr(model, "init_from_images"):
            return params
        split = self.pipeline.train
        count = min(model.num_init_images, split.labels.shape[0])
        images = split.get_batch(np.arange(count, dtype=np.int32))["image"]
        return self.jit_once(model.init_from_images)(params, images)

    def _with_proxy(
        self, state: TrainState, model: nn.Module, tx: optax.GradientTransformation
    ) -> TrainState:
        selection, proxy = hardest_images(
            model,
            tx,
            jax.random.fold_in(self._initial_key, 1),
            self.dataset.image_shape,
            keep=self.config.proxy.keep,
            update_every=self.config.proxy.update_every,
            loss_fn=self.loss_fn,
        )
        proxy["params"] = self._from_images(model, proxy["params"])
        return state.replace(selection=selection, proxy=proxy)

    def _static_arguments(self) -> dict[str, Any]:
        found = static_arguments(
            self.model,
            self.tx,
            self.dataset.image_shape,
            self.loss_fn,
            self.metric_fns,
            self.averaging,
        )
        if self.config.runtime.fast_cpu:
            found["apply_fn"] = fast_cpu(found["apply_fn"])
        return found

    def _check_batch_size(self, state: TrainState) -> None:
        if "batch_stats" in state.model_state and self.config.batch_size == 1:
            raise UserError(
                "batch_size=1 and a model with batch normalization: the statistics of one image "
                "are not those of others, and nothing would be learned; choose batch_size=2 or "
                "more, or a model without"
            )

    def _check_step(self, state: TrainState) -> None:
        """Traces what a script has passed, so that a mistake in it leaves no run directory."""
        shape = self.dataset.image_shape
        for scale in {stage.scale for stage in self.stages if stage.scale != 1}:
            self._check_smaller(state, (*scaled_size(shape[:2], scale), shape[2]))
        if not self.given:
            return
        image, label = self._batch_types(shape)
        logits = jax.eval_shape(predict_step, state, image)
        if logits.shape[1] < self.dataset.num_classes:
            raise UserError(
                f"the model returns {logits.shape[1]} logits for {self.dataset.num_classes} "
                f"classes; give it num_classes={self.dataset.num_classes}"
            )
        try:
            jax.eval_shape(train_step, state, {"image": image, "label": label})
        except TypeError as error:
            reason = (str(error).splitlines() or ["TypeError"])[0]
            raise UserError(f"a training step cannot be traced: {reason}") from error

    def _check_smaller(self, state: TrainState, shape: tuple[int, int, int]) -> None:
        image, label = self._batch_types(shape)
        try:
            jax.eval_shape(train_step, state, {"image": image, "label": label})
        except UserError as error:
            raise UserError(f"resizing.scales={self.pipeline.resizing.scales}: {error}") from error
        except (FlaxError, TypeError, ValueError) as error:
            height, width, _ = self.dataset.image_shape
            raise UserError(
                f"resizing.scales={self.pipeline.resizing.scales}: {type(self.model).__name__} "
                f"takes images of {height}x{width} pixels but none of {shape[0]}x{shape[1]}; "
                f"choose a model that pools over all places before its head, such as resnet18, or "
                f"set resizing.scales=()"
            ) from error

    def _batch_types(
        self, shape: tuple[int, int, int]
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Of the images and the labels of a batch."""
        size = self.config.batch_size
        image = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        return image, jax.ShapeDtypeStruct((size,), jnp.int32)

    def jit_once(
        self, fn: Callable[..., Any], static_argnames: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """See `cnn.runtime.jit_once`."""
        return jit_once(fn, static_argnames, on_cpu=is_on_cpu(self.mesh))

    def learning_rate(self, step: int, opt_state: Any) -> float | None:
        """The learning rate of the last update; None if it is not known.

        Args:
          step: the number of steps made, without those that were skipped.
          opt_state: after them: what a plateau has scaled the rate by.
        """
        if self.schedule is None:
            return None
        update = max(step // self._accumulation - 1, 0)
        return float(_scheduled(self.schedule, np.int32(update))) * plateau_scale(opt_state)


@functools.partial(jax.jit, static_argnames="schedule")
def _scheduled(schedule: optax.Schedule, update: jax.Array) -> jax.Array:
    return jnp.asarray(schedule(update))


def devices_of(config: Any) -> list[Any]:
    """The devices that a checked config names."""
    runtime = config.runtime
    with waiting("starting the devices"):
        return select_devices(
            runtime.platform, runtime.num_devices, deterministic=runtime.deterministic
        )


def create_experiment(
    config: Any,
    devices: list[Any],
    *,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    augment: Augment | None = None,
    like: Experiment | None = None,
) -> Experiment:
    """Loads the data and builds what a checked config names.

    Args:
      config: from `check_config`.
      devices: to use.
      dataset: replaces the config's, as the arguments that follow do.
      model: a linen module that returns logits for the dataset's classes.
      tx: an optimizer.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`.
      augment: see `cnn.augment`.
      like: an experiment whose images are taken, on the host and on the devices, where the configs
        have the same dataset.

    Raises:
      UserError: if the dataset cannot be loaded, or is too small for the batch, the augmentation or
        the schedule.
    """
    passed = {"model": model, "tx": tx, "loss_fn": loss_fn, "augment": augment}
    given = describe_given(config, **passed, dataset=dataset)
    if dataset is None:
        is_same = like is not None and like.config.dataset == config.dataset
        dataset = like.dataset if is_same else load_config_dataset(config.to_dict())  # type: ignore
    else:
        normalization = config.dataset.normalization
        given["dataset"] = {"object": dataset.name, "normalization": normalization}
    mix = None
    if augment is None:
        augment, mix = create_augmentations(**config.augment.to_dict())
    pipeline = Pipeline(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        normalization=config.dataset.normalization,
        augment=augment,
        resizing=ProgressiveResizing(**config.resizing.to_dict()),
        mix=mix,
        mesh=data_mesh(devices, config.batch_size),
        steps_per_execution=config.runtime.steps_per_execution,
    )
    if like is not None:
        pipeline.share_images(like.pipeline)
    num_steps = max(round(config.num_epochs * pipeline.steps_per_epoch), 1)
    if num_steps >= 2**31:
        raise UserError(
            f"num_epochs={config.num_epochs:g} makes {num_steps:,} steps; a run has less than 2**31"
        )
    schedule, warmup_updates, proxy = None, 0, None
    if config.proxy.name != "none":
        if tx is not None:
            raise UserError(
                f"proxy.name={config.proxy.name} needs the optimizer of the config, which tx= "
                f"replaces; pass no tx, or set proxy.name=none"
            )
        proxy = create_proxy(config, dataset.num_classes, num_steps, pipeline.steps_per_epoch)
    if tx is None:
        schedule, warmup_updates = run_schedule(config, num_steps, pipeline.steps_per_epoch)
        tx = create_optimizer(**optimizer_arguments(config, num_steps, pipeline.steps_per_epoch))
        if config.schedule.plateau_patience:
            tx = reduce_on_plateau(
                tx,
                steps_per_epoch=pipeline.steps_per_epoch,
                patience=config.schedule.plateau_patience,
                factor=config.schedule.plateau_factor,
                min_scale=config.schedule.plateau_min_scale,
            )
    return Experiment(
        config=config,
        dataset=dataset,
        pipeline=pipeline,
        model=create_model(num_classes=dataset.num_classes, **config.model.to_dict())
        if model is None
        else model,
        tx=tx,
        loss_fn=create_loss(**config.loss.to_dict()) if loss_fn is None else loss_fn,
        metric_fns=find_metrics(config.metrics),
        schedule=schedule,
        averaging=create_averaging(num_steps=num_steps, **config.averaging.to_dict()),
        proxy=proxy,
        num_steps=num_steps,
        warmup_updates=warmup_updates,
        num_devices=len(devices),
        given=given,
    )


def describe_given(config: Any, **given: Any) -> dict[str, Any]:
    """What is recorded of the objects that a script passes, by the config section they replace.

    Args:
      config: checked.
      **given: the arguments of `create_experiment` of these names; None where there is no object.

    Raises:
      UserError: an object is of the wrong kind.
    """
    _check_passed(**given)
    described = {
        SECTIONS[name]: describe_object(value)
        for name, value in given.items()
        if value is not None and name != "dataset"
    }
    if given["tx"] is not None:
        described["schedule"] = {}  # an optimizer has its own, if any
    if (dataset := given["dataset"]) is not None:
        normalization = config.dataset.normalization
        described["dataset"] = {"object": dataset.name, "normalization": normalization}
    return described


def load_config_dataset(config: Mapping[str, Any]) -> Dataset:
    """Loads the folder of a checked config if it has one, else the dataset that it names.

    Args:
      config: with all fields, also as `config.json` has it.

    Raises:
      UserError: as for `load_folder` and `load_dataset`.
    """
    given = config["dataset"]
    how = {name: given[name] for name in ("image_size", "resize", "test_fraction", "split_seed")}
    with waiting(f"loading {given['folder'] or given['name']}"):
        if given["folder"]:
            return load_folder(given["folder"], **how, on_unreadable=given["on_unreadable"])
        return load_dataset(given["name"], config["runtime"]["data_dir"] or None, **how)


def _check_passed(*, model: Any, tx: Any, loss_fn: Any, augment: Any, dataset: Any) -> None:
    """Raises UserError for an object of the wrong kind."""
    is_optimizer = hasattr(tx, "init") and hasattr(tx, "update")
    for name, value, fits, kind in (
        (
            "model",
            model,
            isinstance(model, nn.Module),
            "a linen module, such as MLP(num_classes=10)",
        ),
        ("tx", tx, is_optimizer, "an Optax optimizer, such as optax.adam(1e-3)"),
        ("loss_fn", loss_fn, callable(loss_fn), "a function of (logits, labels)"),
        ("augment", augment, callable(augment), "a function of (key, images)"),
        ("dataset", dataset, isinstance(dataset, Dataset), "a cnn.Dataset"),
    ):
        if value is not None and not fits:
            raise UserError(f"{name} must be {kind}, not {value!r}")


def notes(experiment: Experiment) -> list[str]:
    """Settings that have no effect, or less than their names promise, a line each."""
    config, num_steps = experiment.config, experiment.num_steps
    every = config.runtime.checkpoint_every_steps
    lines = _schedule_notes(experiment) if experiment.schedule is not None else []
    if every >= num_steps:
        lines.append(
            f"runtime.checkpoint_every_steps={every} has no effect: the run has {num_steps:,} steps"
        )
    if experiment.stages[-1].scale != 1:
        lines.append(
            f"resizing.until_epochs={experiment.pipeline.resizing.until_epochs}: the run ends "
            f"before it trains on whole images"
        )
    patience, num_epochs = config.early_stopping.patience, experiment.epoch(num_steps)
    if patience and patience + 1 >= num_epochs:  # the first epoch always improves
        lines.append(
            f"early_stopping.patience={patience} has no effect: the run has {num_epochs:g} epochs"
        )
    return lines


def _schedule_notes(experiment: Experiment) -> list[str]:
    config, num_steps = experiment.config, experiment.num_steps
    schedule, accumulation = config.schedule, config.optimizer.grad_accumulation_steps
    lines = []
    if rest := num_steps % accumulation:
        lines.append(
            f"steps at the end without effect: {rest:,} of {num_steps:,}, which do not fill "
            f"optimizer.grad_accumulation_steps={accumulation}"
        )
    if schedule.plateau_patience >= num_steps // experiment.steps_per_epoch > 0:
        lines.append(
            f"schedule.plateau_patience={schedule.plateau_patience} has no effect: the run has "
            f"{experiment.epoch(num_steps):g} epochs"
        )
    if schedule.warmup_epochs and not experiment.warmup_updates:
        lines.append(
            f"schedule.warmup_epochs={schedule.warmup_epochs} has no effect: it is less than one "
            f"update"
        )
    if experiment.warmup_updates >= experiment.num_updates and schedule.name != "constant":
        lines.append(
            f"schedule.name={schedule.name} has no effect: schedule.warmup_epochs="
            f"{schedule.warmup_epochs} takes the whole run"
        )
    return lines


def describe(experiment: Experiment, variables: Any, *, width: int) -> str:
    """What is about to be trained: data, batches, devices, notes on settings, layers.

    Args:
      experiment: of the run.
      variables: the model's parameters and other collections.
      width: columns that the table of layers may have.
    """
    data, used = experiment.dataset, experiment.mesh.size
    batch_size, steps = experiment.pipeline.batch_size, experiment.steps_per_epoch
    train_count, test_count = len(data.train), len(data.test)
    kind = experiment.mesh.devices.flat[0].device_kind
    left_out = train_count - steps * batch_size
    size = "x".join(map(str, data.image_shape))
    lines = [
        f"data: {data.name}, {size}, {number_of(data.num_classes, 'class', 'classes')}",
        f"images: {train_count:,} for training, {test_count:,} for testing",
        f"batches: {steps:,} of {batch_size:,} images in each epoch"
        + (f"; {number_of(left_out, 'image')} left out" if left_out else ""),
        f"devices: {used} x {kind}, {batch_size // used:,} images each per step",
    ]
    if experiment.stages[0].scale != 1:
        lines.append(f"sizes: {_sizes(experiment)}")
    lines += [f"{name}: {_origin(origin)}" for name, origin in experiment.given.items() if origin]
    if used < experiment.num_devices:
        lines.append(
            f"note: batch_size={batch_size} does not divide evenly over "
            f"{experiment.num_devices} devices; {experiment.num_devices - used} stay idle"
        )
    lines += [f"note: {line}" for line in notes(experiment)]
    if experiment.proxy is not None:
        config = experiment.config
        lines.append(
            f"proxy: {config.proxy.name}, chooses {config.proxy.keep:,} of each batch's "
            f"{batch_size:,} images"
        )
    if experiment.freeze:
        total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        kept = num_frozen(experiment, variables["params"])
        lines.append(f"frozen: {kept:,} of {total:,} parameters")
    table = model_summary(experiment.model, variables, data.image_shape, width=width)
    return "\n".join([*lines, table])


def _sizes(experiment: Experiment) -> str:
    """Of the images that are trained on, by epoch."""
    parts = []
    for stage in experiment.stages:
        height, width = scaled_size(experiment.dataset.image_shape[:2], stage.scale)
        parts.append(f"{height}x{width} up to epoch {experiment.epoch(stage.stop):g}")
    return ", ".join(parts)


def num_frozen(experiment: Experiment, params: Any) -> int:
    """How many parameters the config freezes."""
    mask = jax.tree.leaves(frozen(params, experiment.freeze))
    pairs = zip(jax.tree.leaves(params), mask, strict=True)
    return sum(leaf.size for leaf, is_frozen in pairs if is_frozen)


def _origin(origin: dict[str, Any]) -> str:
    return f"{origin['object']}, passed by the script"
