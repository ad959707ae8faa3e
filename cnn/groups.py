"""Several runs in one program: many seeds of a config, and the points of a sweep.

Each run of a group has a run directory of its own, which is that of the single run with its config:
with its checkpoints, records and result. So a group resumes as its runs do, and more seeds can be
added later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax

from cnn.augment import Augment
from cnn.config import check_config, to_json_dict
from cnn.data import Dataset
from cnn.divergence import DivergenceError
from cnn.errors import Interrupted, UserError, number_of
from cnn.experiment import Experiment, create_experiment, describe, describe_given, devices_of
from cnn.group_results import about, group_result, present_group
from cnn.group_texts import member_row
from cnn.losses import LossFn
from cnn.members import Member, group_members
from cnn.resume import check_same_config
from cnn.runs import Run, explained_disk_errors, open_run
from cnn.runtime import screen
from cnn.runtime.compile_cache import compilation_cache
from cnn.runtime.jax_settings import pinned_settings
from cnn.runtime.progress import Rows
from cnn.runtime.run_directory import RunDirectory
from cnn.runtime.signals import GracefulShutdown
from cnn.side_by_side import train_side_by_side
from cnn.training import train_run

_POLL_SECONDS = 0.2
# Points of a sweep after which all compiled programs are dropped. Those of a point take some 550 of
# the 65,530 mappings that Linux gives a process, and XLA dies at the limit.
_POINTS_KEPT = 16


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
        finished = group.check()
        if is_new := bool(group.pending):
            with compilation_cache(config.runtime.compilation_cache):
                group.train()
        seconds = time.monotonic() - started
        result = group_result(group.members, group.outcomes, seconds)
        if finished is not None and not is_new:  # it may have held more runs
            result["wall_seconds"] = finished["wall_seconds"]
        if result != finished:
            run.write("result.json", result)
        present_group(
            run,
            result,
            title=_title(config, given),
            label_smoothing=config.loss.get("label_smoothing", 0.0) if loss_fn is None else 0.0,
            is_new=result != finished,
        )
    if not result["members"]:
        raise UserError(
            f"all {number_of(len(group.members), 'run')} diverged: {result['diverged'][0]['error']}"
        )
    return result


def _title(config: Any, given: dict[str, Any]) -> str:
    """Of the pictures: network, dataset and seeds."""
    model, dataset = given["model"], given["dataset"]
    network = config.model.name if model is None else type(model).__name__
    folder = Path(config.dataset.folder).name
    data = (folder or config.dataset.name) if dataset is None else dataset.name
    last = config.seed + config.num_seeds - 1
    seeds = f"seeds {config.seed} to {last}" if last > config.seed else f"seed {last}"
    return f"{network} on {data}, {seeds}"


class _Group:
    """The runs of a group, and what became of them.

    Args:
      config: of the group, checked.
      run: its directory.
      given: what a script passes, by the name of the argument.

    Attributes:
      members: the runs, in order.
      pending: those of them that are to be trained.
      outcomes: by name, the result of a run, or the `error` by which it diverged.
    """

    def __init__(self, config: Any, run: RunDirectory, given: dict[str, Any]) -> None:
        self._config, self._run, self._given = config, run, given
        self.members = group_members(config)
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._described = describe_given(config, **given)
        self.pending: list[Member] = []
        self._waiting: list[Member] = []  # of these, what no thread has taken yet
        self._begun: list[Any] = []  # the settings of what was taken
        self._rows, self._best_accuracy = Rows(), -1.0
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._is_stopped = False

    def check(self) -> dict[str, Any] | None:
        """Finds the runs that are finished.

        Returns:
          The result of the group, if all runs that it had before are finished.

        Raises:
          UserError: the directory holds something else, or cannot be written.
        """
        run = self._run
        if run.config() is not None and not run.is_group:
            raise UserError(f"{run.path} holds a single run; choose another --workdir")
        before = run.check()
        check_same_config(run, self._recorded(self._config), but=("num_seeds", "sweep"))
        if self._config.runtime.on_nonfinite == "stop":  # else they would go on
            self.outcomes = {one["name"]: one for one in (before or {}).get("diverged", [])}
        for member in self.members:
            directory = self._directory(member)
            if (result := directory.result()) is not None:
                check_same_config(directory, self._recorded(member.config))
                self.outcomes[member.name] = result
        self.pending = [one for one in self.members if one.name not in self.outcomes]
        return before

    def _recorded(self, config: Any) -> dict[str, Any]:
        return {**to_json_dict(config), **self._described}

    def _directory(self, member: Member) -> RunDirectory:
        return RunDirectory(self._run.members_folder / member.name)

    def train(self) -> None:
        """Trains what is pending.

        Raises:
          UserError: a run cannot be trained or saved, for another reason than its numbers.
          Interrupted: after a signal.
        """
        config, run, pending = self._config, self._run, self.pending
        self._waiting = list(pending)
        known = (one.get("test_accuracy", -1.0) for one in self.outcomes.values())
        self._best_accuracy = max(known, default=-1.0)
        devices = devices_of(config)
        lanes = _lanes(config.runtime.group_layout, devices, len(pending))
        first = create_experiment(pending[0].config, lanes[0], **self._given)
        run.lock()
        run.delete_result()
        run.members_folder.mkdir(exist_ok=True)
        run.write("config.json", self._recorded(config))
        screen.log(describe(first, first.initial_shapes().variables, width=screen.width()))
        screen.log(_plan(len(self.members), len(pending), lanes))
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
                    if self._failure is not None:
                        shutdown.request()
                    self._is_stopped |= shutdown.requested() is not None
            signum = shutdown.requested()
        failure = self._failure
        if failure is not None and not isinstance(failure, Interrupted):
            raise failure
        if signum is not None and len(self.outcomes) < len(self.members):
            raise Interrupted(
                f"stopped by {signal.Signals(signum).name}: {len(self.outcomes):,} of "
                f"{number_of(len(self.members), 'run')} are finished, and those that were being "
                f"trained are saved; the same command resumes them",
                signum,
            )

    def _work(self, devices: list[Any], like: Experiment | None) -> None:
        """Trains runs on some devices, until none is left; runs in a thread."""
        settings = None
        while members := self._next(settings):
            settings = members[0].settings
            try:
                if self._config.runtime.group_layout == "vmap":
                    outcomes, like = self._train_side_by_side(members, devices, like)
                else:
                    (member,) = members
                    with screen.part(member.name):
                        outcome, like = self._train(member, devices, like)
                    outcomes = [outcome]
            except BaseException as failure:  # it is raised in the main thread
                with self._lock:
                    self._failure, self._is_stopped = self._failure or failure, True
                return
            with self._lock:
                for member, outcome in zip(members, outcomes, strict=True):
                    self.outcomes[member.name] = outcome
                    self._show({**about(member), **outcome})

    def _show(self, outcome: dict[str, Any]) -> None:
        """Prints the row of a run that is over."""
        accuracy = outcome.get("test_accuracy", -1.0)
        if is_best := accuracy > self._best_accuracy:
            self._best_accuracy = accuracy
        group = [about(one) for one in self.members]
        self._rows.log(*member_row(outcome, group, is_best=is_best, width=screen.width()))

    def _next(self, settings: dict[str, Any] | None) -> list[Member]:
        """The next run to be trained, or those that are trained side by side.

        Args:
          settings: of the run before on the same devices, for which a program is compiled there.
        """
        with self._lock:
            if self._is_stopped or not self._waiting:
                return []
            if settings not in (own := [one.settings for one in self._waiting]):
                fresh = [one for one in own if one not in self._begun]
                settings = (fresh or own)[0]
            if settings not in self._begun:
                if len(self._begun) % _POINTS_KEPT == _POINTS_KEPT - 1:
                    jax.clear_caches()
                self._begun.append(settings)
            members = [one for one in self._waiting if one.settings == settings]
            if self._config.runtime.group_layout != "vmap":
                members = members[:1]
            self._waiting = [one for one in self._waiting if one not in members]
            return members

    def _train(
        self, member: Member, devices: list[Any], like: Experiment | None
    ) -> tuple[dict[str, Any], Experiment]:
        """The result of a run, or what made it diverge, and its experiment."""
        try:
            with self._open(member, devices, like) as run:
                like = run.experiment
                if run.result is None:
                    train_run(run)
                assert run.result is not None
                return run.result, like
        except DivergenceError as error:
            assert like is not None
            return {"error": str(error)}, like

    def _train_side_by_side(
        self, members: list[Member], devices: list[Any], like: Experiment | None
    ) -> tuple[list[dict[str, Any]], Experiment]:
        """The results of runs that differ in their seeds, and the experiment of one of them."""
        with contextlib.ExitStack() as opened, screen.part(f"{len(members)} runs"):
            runs: list[Run] = []
            for member in members:
                runs.append(opened.enter_context(self._open(member, devices, like)))
                like = runs[-1].experiment
            outcomes = [run.result for run in runs]
            # Some may be ahead: a signal or an error came while others had been saved already.
            steps = {i: int(run.state.step) for i, run in enumerate(runs) if run.result is None}
            for step in sorted(set(steps.values())):
                same = [i for i in steps if steps[i] == step]
                diverged = train_side_by_side([runs[i] for i in same], devices)
                for place, i in enumerate(same):
                    error = diverged.get(place)
                    outcomes[i] = runs[i].result if error is None else {"error": str(error)}
        assert like is not None
        return [outcome for outcome in outcomes if outcome is not None], like

    def _open(
        self, member: Member, devices: list[Any], like: Experiment | None
    ) -> contextlib.AbstractContextManager[Run]:
        """Opens a run, which shares with an earlier one what is the same."""

        def create() -> Experiment:
            if like is not None and _without_seed(like.config) == _without_seed(member.config):
                return like.with_seed(member.config)
            return create_experiment(member.config, devices, **self._given, like=like)

        path = self._directory(member).path
        return open_run(member.config, path, create, described=self._described, announces=False)


def _without_seed(config: Any) -> dict[str, Any]:
    return {**to_json_dict(config), "seed": 0}


def _lanes(layout: str, devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of the runs that are trained at the same time."""
    if layout in ("in_turn", "vmap") or jax.process_count() > 1:
        return [devices]
    return [[device] for device in devices[:count]]


def _plan(total: int, pending: int, lanes: list[list[Any]]) -> str:
    before = f", {total - pending:,} of them finished before" if pending < total else ""
    at_once = f"{len(lanes)} at a time, each on one device" if len(lanes) > 1 else "one at a time"
    return f"runs: {total:,}{before}; {at_once}"
