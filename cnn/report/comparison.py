"""Groups of runs that differ in their seeds only, and how the groups differ in accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cnn.config import fields, flatten, to_json_value, used
from cnn.errors import UserError
from cnn.registry import REQUIRED
from cnn.report.runs import Run
from cnn.statistics import (
    Disagreement,
    MeanDifference,
    PairedDifference,
    Spread,
    mcnemar,
    paired_difference,
    spread,
    welch_test,
)

_DATA = "dataset (fingerprint)"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs whose configs differ in `seed` and `runtime` only, on the same images.

    Attributes:
      letter: A, B and so on, in the order of the runs.
      runs: by seed.
      settings: the config fields in which the groups differ.
    """

    letter: str
    runs: list[Run]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> Spread:
        """The final test accuracy over the seeds."""
        return spread([run.accuracy for run in self.runs])

    @property
    def fingerprint(self) -> str | None:
        """Of the dataset of all its runs; None if that was not recorded."""
        dataset = self.runs[0].dataset
        return None if dataset is None else dataset["fingerprint"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs that classified the same test images.

    Attributes:
      first: of the first group.
      second: of the other group.
      difference: in accuracy, second minus first.
      disagreement: of the two.
    """

    first: Run
    second: Run
    difference: PairedDifference
    disagreement: Disagreement


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A group compared with the first one: differences are the group's minus the first one's.

    Attributes:
      first: the first group.
      second: the other one.
      same_data: whether both were tested on the same images, by the fingerprints of their datasets;
        None if one of them was not recorded. If it is False there are no differences at all.
      means: of the test accuracies over seeds; None if the images are not the same.
      images: the difference on the same images, averaged over the runs with predictions; None if
        the groups have no predictions for the same images.
      pairs: of runs with the same seed; of the first runs with predictions if no seed is in both.
    """

    first: Group
    second: Group
    same_data: bool | None
    means: MeanDifference | None
    images: PairedDifference | None
    pairs: list[Pair]


def letter(index: int) -> str:
    """The name of a group: A to Z, then A2 and so on.

    >>> letter(0), letter(27)
    ('A', 'B2')
    """
    turn, place = divmod(index, len(string.ascii_uppercase))
    return string.ascii_uppercase[place] + (f"{turn + 1}" if turn else "")


def values_of(run: Run) -> dict[str, Any]:
    """The config fields that a run uses and the fingerprint of its data, by dotted name."""
    values = used(flatten(run.config))
    # A field that was added since then had no other value than its default.
    with contextlib.suppress(UserError):  # what it names is not known to this version
        for name, field in fields(ConfigDict(run.config)).items():
            if field.default is not REQUIRED:
                values.setdefault(name, to_json_value(field.default))
    if run.dataset is not None:
        values[_DATA] = run.dataset["fingerprint"][:12]
    return values


def differing(runs: Iterable[Run]) -> list[str]:
    """The fields in which runs differ, in the order of the config."""
    values = [values_of(run) for run in runs]
    names = {name: None for one in values for name in one}
    return [name for name in names if any(v.get(name) != values[0].get(name) for v in values)]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The groups, in the order in which they first occur."""
    members: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        key = {n: v for n, v in values_of(run).items() if _is_setting(n)}
        found = next((group for known, group in members if known == key), None)
        if found is None:
            members.append((key, [run]))
        else:
            found.append(run)
    names = {name for name in differing(runs) if _is_setting(name)}
    return [
        _group(index, group, {name: value for name, value in key.items() if name in names})
        for index, (key, group) in enumerate(members)
    ]


def as_groups(first: Sequence[Run], second: Sequence[Run]) -> tuple[Group, Group]:
    """Two groups that are given as such, whether or not their settings differ.

    Args:
      first: runs of one setting.
      second: likewise.
    """
    sides = first, second
    names = [name for name in differing([*first, *second]) if _is_setting(name)]
    values = [values_of(runs[0]) for runs in sides]
    a, b = (
        _group(index, runs, {name: values[index][name] for name in names if name in values[index]})
        for index, runs in enumerate(sides)
    )
    return a, b


def _group(index: int, runs: Sequence[Run], settings: dict[str, Any]) -> Group:
    return Group(letter(index), sorted(runs, key=lambda run: run.config.get("seed", 0)), settings)


def _is_setting(name: str) -> bool:
    return name != "seed" and not name.startswith("runtime.")


def compare(first: Group, second: Group) -> Comparison:
    """Compares the test accuracies of two groups, over seeds and over images.

    Groups that were tested on different images are not compared: a difference of their accuracies
    would be one of the images as well.
    """
    fingerprints = {first.fingerprint, second.fingerprint}
    same_data = None if None in fingerprints else len(fingerprints) == 1
    if same_data is False:
        return Comparison(first, second, same_data, means=None, images=None, pairs=[])
    samples = [[run.accuracy for run in group.runs] for group in (first, second)]
    known = [_with_predictions(group) for group in (first, second)]
    known[1] = [run for run in known[1] if known[0] and _same_images(known[0][0], run)]
    known[0] = [run for run in known[0] if known[1] and _same_images(known[1][0], run)]
    rates = [np.mean([_correct(run) for run in runs], axis=0) for runs in known if runs]
    return Comparison(
        first=first,
        second=second,
        same_data=same_data,
        means=welch_test(*samples),
        images=paired_difference(*rates) if len(rates) == 2 else None,
        pairs=[_pair(*runs) for runs in _pairs(*known)],
    )


def _with_predictions(group: Group) -> list[Run]:
    return [run for run in group.runs if run.current_evaluation is not None]


def _same_images(one: Run, other: Run) -> bool:
    a, b = one.current_evaluation, other.current_evaluation
    assert a is not None
    assert b is not None
    return a.fingerprint == b.fingerprint and np.array_equal(a.labels, b.labels)


def _correct(run: Run) -> np.ndarray:
    assert run.current_evaluation is not None
    return run.current_evaluation.correct


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    same_seed = [(a, b) for a in first for b in second if a.config["seed"] == b.config["seed"]]
    return same_seed or list(zip(first[:1], second[:1], strict=True))


def _pair(first: Run, second: Run) -> Pair:
    correct = _correct(first), _correct(second)
    return Pair(first, second, paired_difference(*correct), mcnemar(*correct))
