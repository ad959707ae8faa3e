"""A fresh run that starts from the weights of another: `config.init_from`.

Parameters and other collections, such as running statistics, are those of the other run's latest
checkpoint, averaged where that run scored an average; optimizer state, step and random key are new,
and an average begins with the transferred weights. A layer whose shape depends on the number
of classes, the head, is new where that number differs. Any other difference is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cnn.averaging import evaluated_network
from cnn.config import config_diff
from cnn.errors import UserError
from cnn.experiment import Experiment
from cnn.ops import optax_update
from cnn.optimizers import frozen
from cnn.runtime import leaves
from cnn.runtime.checkpoints import CheckpointManager
from cnn.runtime.devices import replicated_sharding
from cnn.runtime.disk import resolve_path
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.screen import log, shown, waiting
from cnn.steps import TrainState, begin_averaging


def find_source(init_from: str, run: RunDirectory | None = None) -> Path | None:
    """The run whose weights are wanted; None if there is none, or the run resumes its own.

    Args:
      init_from: the field of the config.
      run: that is to start, if it has a directory.

    Raises:
      UserError: there is no run with a checkpoint, or it is the run itself.
    """
    if not init_from:
        return None
    source = resolve_path(init_from)
    if run is not None and _is_same(source, run.path):
        raise UserError(
            f"init_from={init_from} is the run directory of this run; choose another --workdir, or "
            f"leave init_from out to resume that run"
        )
    if run is not None and (run.has_begun or CheckpointManager(run.checkpoints).all_steps()):
        return None
    if not os.path.isdir(source):  # Path's own raises where a name is too long
        fault = "is not a folder" if os.path.exists(source) else "does not exist"
        raise UserError(f"init_from={init_from} {fault}; give the run directory of a run")
    if not CheckpointManager(source / "checkpoints").all_steps():
        RunDirectory(source).check_is_one()
        begun = RunDirectory(source).has_begun
        fault = "holds no checkpoint" if begun else "is not a run directory"
        raise UserError(
            f"init_from={init_from} {fault}; give a folder with config.json and checkpoints/"
        )
    return source


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a == b or os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return False


def transfer(
    experiment: Experiment, state: TrainState, source: Path, config: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The fresh state with the weights of another run; the screen says what is new.

    Args:
      experiment: of the run that starts.
      state: fresh; it gives what the other run does not have.
      source: from `find_source`.
      config: the resolved config, as it is recorded.

    Returns:
      The state, and where its weights come from: `run`, `step` and `digest`.

    Raises:
      UserError: the latest checkpoint is damaged, or of a network with other layers.
    """
    with waiting(f"reading the weights of {shown(source)}"):
        arrays, record = _read_latest(source)
    mine = leaves.by_path({"params": state.params, "model_state": state.model_state})
    theirs = leaves.by_path(
        evaluated_network(arrays, record.get("config", {}).get("averaging", {}))
    )
    fresh = fresh_leaves(mine, theirs, _class_names(record), experiment.dataset.class_names, source)
    values = [
        leaf if path in fresh else leaves.like(leaf, theirs[path]) for path, leaf in mine.items()
    ]
    structure = jax.tree.structure({"params": state.params, "model_state": state.model_state})
    state = begin_averaging(state.replace(**jax.tree.unflatten(structure, values)))
    # Some optimizers begin with a copy of the parameters.
    opt_state = experiment.jit_once(optax_update.initial_state, ("tx",))(
        tx=state.tx, params=state.params
    )
    state = state.replace(opt_state=jax.device_put(opt_state, replicated_sharding(experiment.mesh)))
    origin = {"run": str(source), "step": int(arrays["step"]), "digest": record["digest"]}
    log(f"weights: of {shown(source)}, step {origin['step']:,}, digest {origin['digest'][:12]}...")
    for line in _notes(experiment, state, fresh, record, config):
        log(line)
    return state, origin


def _read_latest(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and record of the latest checkpoint of a run, which may be training meanwhile."""
    checkpoints = CheckpointManager(source / "checkpoints")
    while True:
        step = checkpoints.latest_step()
        try:
            if step is None:
                raise UserError(f"{source} holds no checkpoint any more")
            return checkpoints.read(step)
        except UserError as error:
            if checkpoints.latest_step() == step:  # else a later one has replaced it
                raise UserError(
                    f"init_from: {error}; restore it from a backup, or start from another run"
                ) from error


def _class_names(record: Mapping[str, Any]) -> Sequence[str] | None:
    """The classes that a run was trained on; None where its checkpoint does not say it."""
    dataset = record.get("dataset")
    names = dataset.get("class_names") if isinstance(dataset, dict) else None
    return names if isinstance(names, list) else None


def fresh_leaves(
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    source_classes: Sequence[str] | None,
    classes: Sequence[str],
    source: Path,
) -> list[str]:
    """The leaves that keep their fresh values, because their shape depends on the class count.

    These differ in one axis, which has the length of the number of classes in both networks.

    Args:
      mine: leaves of the fresh state by path.
      theirs: leaves of the other run by path.
      source_classes: of the other run; None if they are not known.
      classes: of this run.
      source: of the other run, for messages.

    Raises:
      UserError: a leaf is missing, is additional, or has another shape or dtype.
    """
    differing = leaves.differences(theirs, mine)
    if differing and source_classes is None:
        raise UserError(
            f"{source} was saved by a version that did not record its classes, so it is not known "
            f"which layers are the head, and {leaves.first_of(differing.values())}; train it again"
        )
    counts = (len(source_classes or ()), len(classes))
    wrong = [
        line
        for path, line in differing.items()
        if not _is_of_head(mine.get(path), theirs.get(path), counts)
    ]
    if wrong:
        raise UserError(
            f"init_from: {source} has another network than this config: "
            f"{leaves.first_of(wrong)}; choose the same model and image size"
        )
    return list(differing)


def _is_of_head(mine: Any, theirs: Any, counts: tuple[int, int]) -> bool:
    """Whether two leaves differ in one axis only, which is that of the classes."""
    if mine is None or theirs is None or leaves.is_key(mine) or leaves.is_key(theirs):
        return False
    if mine.dtype != theirs.dtype or mine.ndim != theirs.ndim:
        return False
    differing = [pair for pair in zip(theirs.shape, mine.shape, strict=True) if pair[0] != pair[1]]
    return differing == [counts]


def _notes(
    experiment: Experiment,
    state: TrainState,
    fresh: Sequence[str],
    record: Mapping[str, Any],
    config: Mapping[str, Any],
) -> list[str]:
    """What a person should know of the weights: new layers, and what may not fit."""
    before, now = _class_names(record), experiment.dataset.class_names
    lines = []
    if fresh:
        layers = _layers(fresh)
        lines.append(f"new layers: {', '.join(layers)} ({len(before or ())} -> {len(now)} classes)")
        mask = leaves.by_path({"params": frozen(state.params, experiment.freeze)})
        if unlearned := _layers([path for path in fresh if mask.get(path)]):
            lines.append(f"note: new and frozen, so never trained: {', '.join(unlearned)}")
    elif before is not None and list(before) != list(now):
        lines.append("note: no layer is new, although the classes have other names")
    changes = config_diff(record["config"], dict(config))
    relevant = [c for c in changes if c.startswith(("model.", "dataset.normalization:"))]
    return lines + [f"note: the weights were trained with another {c}" for c in relevant]


def _layers(paths: Sequence[str]) -> list[str]:
    """The modules of some leaves, without the name of the collection."""
    return list(dict.fromkeys("/".join(path.split("/")[1:-1]) or path for path in paths))
