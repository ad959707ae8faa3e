"""Several runs in one program: many seeds of a config, and the points of a sweep.

Each run of a group has a run directory of its own, which is that of the single run with its config:
with its checkpoints, records and result. So a group resumes as its runs do, and more seeds can be
added later.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import optax

from cnn.augment import Augment
from cnn.config import check_config, config_diff, to_json_dict, to_json_value
from cnn.data import Dataset
from cnn.divergence import DivergenceError
from cnn.errors import Interrupted, UserError, number_of
from cnn.experiment import Experiment, create_experiment, describe, describe_given
from cnn.losses import LossFn
from cnn.members import Member, group_members
from cnn.resume import check_same_config
from cnn.runs import explained_disk_errors, open_run
from cnn.runtime import screen
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.signals import GracefulShutdown
from cnn.training import devices_of, train_run

_POLL_SECONDS = 0.2


def train_group(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    loss_fn: LossFn | None = None,
    augment: Augment | None = None,
) -> dict[str, Any]:
    """Trains the runs of a group that are not finished yet.

    A run that diverges is counted and costs the others nothing.

    Args:
      config: a `ConfigDict` with `num_seeds` or a `sweep`; see `cnn.members`.
      workdir: the directory of the group; made if it is not there.
      dataset: used instead of the one that the config names; so are the arguments that follow, as
        for `train_and_evaluate`.
      model: any linen module that returns logits.
      tx: any Optax optimizer.
      loss_fn: (logits `float32[B, K]`, labels `int[B]`) -> losses `float[B]`.
      augment: (key, images `uint8[B, H, W, C]`) -> images.

    Returns:
      What the group's `result.json` holds: `members`, with the result of each run; `diverged`; and
      `points`, with the statistics over the seeds of each point of the sweep. Of a sweep also
      `best`, the point with the highest mean test accuracy.

    Raises:
      UserError: as for `train_and_evaluate`, or if all runs diverged.
      Interrupted: after a signal; each run that was being trained is saved.
    """
    started = time.monotonic()
    config = check_config(config)
    given = {"model": model, "tx": tx, "loss_fn": loss_fn, "augment": augment, "dataset": dataset}
    with RunDirectory(workdir) as run, pinned_settings(), explained_disk_errors(run):
        group = _Group(config, run, given)
        group.check()
        if group.pending:
            with compilation_cache(config.runtime.compilation_cache):
                group.train()
        result = group.result(time.monotonic() - started)
        group.present(result)
    return result


class _Group:
    """The runs of a group, and what became of them.

    Args:
      config: of the group, checked.
      run: its directory.
      given: what a script passes, by the name of the argument.

    Attributes:
      pending: the runs to be trained, in order.
    """

    def __init__(self, config: Any, run: RunDirectory, given: dict[str, Any]) -> None:
        self._config, self._run, self._given = config, run, given
        self._members = group_members(config)
        self._described = describe_given(config, **given)
        self._outcomes: dict[str, dict[str, Any]] = {}
        self.pending: list[Member] = []
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._is_stopped = False

    def check(self) -> None:
        """Finds the runs that are finished.

        Raises:
          UserError: the directory holds something else, or cannot be written.
        """
        run = self._run
        if run.config() is not None and not run.is_group:
            raise UserError(f"{run.path} holds a single run; choose another --workdir")
        before = run.check() or {}
        check_same_config(run, self._recorded(self._config), but=("num_seeds", "sweep"))
        if self._config.runtime.on_nonfinite == "stop":  # else they would go on
            self._outcomes = {one["name"]: one for one in before.get("diverged", [])}
        for member in self._members:
            directory = self._directory(member)
            if (result := directory.result()) is not None:
                check_same_config(directory, self._recorded(member.config))
                self._outcomes[member.name] = result
        self.pending = [one for one in self._members if one.name not in self._outcomes]

    def _recorded(self, config: Any) -> dict[str, Any]:
        return {**to_json_dict(config), **self._described}

    def _directory(self, member: Member) -> RunDirectory:
        return RunDirectory(self._run.members / member.name)

    def train(self) -> None:
        """Trains what is pending.

        Raises:
          UserError: a run cannot be trained or saved, for another reason than its numbers.
          Interrupted: after a signal.
        """
        config, run, pending = self._config, self._run, list(self.pending)
        devices = devices_of(config)
        lanes = _lanes(config.runtime.group_layout, devices, len(pending))
        first = create_experiment(pending[0].config, lanes[0], **self._given)
        run.lock()
        run.delete_result()
        run.members.mkdir(exist_ok=True)
        run.write("config.json", self._recorded(config))
        screen.log(describe(first, first.initial_shapes().variables, width=screen.width()))
        screen.log(_plan(len(self._members), len(pending), lanes))
        threads = [
            threading.Thread(target=self._work, args=(lane, first if lane is lanes[0] else None))
            for lane in lanes
        ]
        with GracefulShutdown() as shutdown:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    self._is_stopped |= shutdown.requested() is not None
        if isinstance(failure := self._failure, Interrupted):
            raise Interrupted(
                f"stopped by {signal.Signals(failure.signal).name}: "
                f"{len(self._outcomes):,} of {number_of(len(self._members), 'run')} are finished, "
                f"and those that were being trained are saved; the same command resumes them",
                failure.signal,
            )
        if failure is not None:
            raise failure

    def _work(self, devices: list[Any], like: Experiment | None) -> None:
        """Trains runs, one after another, on some devices; runs in a thread."""
        while (member := self._next()) is not None:
            try:
                with screen.part(member.name):
                    outcome, like = self._train(member, devices, like)
            except BaseException as failure:
                with self._lock:
                    self._failure, self._is_stopped = self._failure or failure, True
                return
            with self._lock:
                self._outcomes[member.name] = outcome
                self._show(member)

    def _show(self, member: Member) -> None:
        screen.log(f"{member.name} {self._outcomes[member.name].get('test_accuracy')}")

    def result(self, wall_seconds: float) -> dict[str, Any]:
        return {"members": self._outcomes}

    def present(self, result: dict[str, Any]) -> None:
        pass

    def _next(self) -> Member | None:
        with self._lock:
            return self.pending.pop(0) if self.pending and not self._is_stopped else None

    def _train(
        self, member: Member, devices: list[Any], like: Experiment | None
    ) -> tuple[dict[str, Any], Experiment]:
        """The result of a run, or what made it diverge, and its experiment."""
        experiment = like

        def create() -> Experiment:
            nonlocal experiment
            if like is not None and config_diff(*map(_without_seed, (like.config, member.config))):
                experiment = create_experiment(member.config, devices, **self._given, like=like)
            elif like is not None:
                experiment = like.with_seed(member.config)
            else:
                experiment = create_experiment(member.config, devices, **self._given)
            return experiment

        replaced = [name for name, value in self._given.items() if value is not None]
        try:
            path = self._directory(member).path
            with open_run(member.config, path, create, replaced=replaced, announces=False) as run:
                if run.result is None:
                    train_run(run)
            result = run.result
        except DivergenceError as error:
            about = {"name": member.name, "seed": member.seed, "settings": member.settings}
            result = {**to_json_value(about), "error": str(error)}
        assert experiment is not None
        assert result is not None
        return result, experiment


def _without_seed(config: Any) -> dict[str, Any]:
    return {**to_json_dict(config), "seed": 0}


def _lanes(layout: str, devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of the runs that are trained at the same time."""
    if layout == "in_turn" or (layout == "auto" and count == 1) or jax.process_count() > 1:
        return [devices]
    return [[device] for device in devices[:count]]


def _plan(total: int, pending: int, lanes: list[list[Any]]) -> str:
    before = f", {total - pending:,} of them finished before" if pending < total else ""
    at_once = f"{len(lanes)} at a time, each on one device" if len(lanes) > 1 else "one at a time"
    return f"runs: {total:,}{before}; {at_once}"
