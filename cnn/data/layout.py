"""Which files of a folder are pictures, of which class, and whether they are for testing."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnn.data.images import image_extensions
from cnn.errors import UserError, number_of

_TRAIN = "train"
# Folders of pictures for testing; the first that is there is used.
_TESTED = ("test", "val", "validation", "valid")
# Written by operating systems and archive programs, beside what begins with a dot.
_IGNORED = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
_NAMES_SHOWN = 5
_LEFT_OUT = ("are left out", "is left out")


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """A file that is to be a picture of a class.

    Attributes:
      path: relative to the folder, with "/" between the parts.
      label: of the class.
      is_test: whether it is for testing; None if the folder does not say it.
      version: size, and times of the last change of content and of metadata, in nanoseconds. A
        file that was changed has another version.
    """

    path: str
    label: int
    is_test: bool | None
    version: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Attributes:
      class_names: sorted; a label is an index.
      files: sorted by path, on every file system.
      notes: what is left out, a line each.
    """

    class_names: tuple[str, ...]
    files: tuple[PictureFile, ...]
    notes: tuple[str, ...]


def find_pictures(root: Path) -> Layout:
    """Finds the pictures below a folder, which has a folder for each class.

    These may be in a folder `train`, and others for testing in `test`, `val`, `validation` or
    `valid`. Hidden files and folders are ignored. Links to folders are followed.

    Raises:
      UserError: the folder has another layout.
      OSError: a folder cannot be read; `filename` names it.
    """
    if not root.exists():
        raise UserError(f"the folder {root} does not exist: look at its name")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that holds a folder per class")
    parts, notes = _parts(root)
    class_names = tuple(_folders(root / parts[_TRAIN]))
    _check_classes(root / parts[_TRAIN], class_names)
    files: list[PictureFile] = []
    others: collections.Counter[str] = collections.Counter()
    for part, place in parts.items():
        names = class_names if part == _TRAIN else tuple(_folders(root / place))
        if unknown := sorted(set(names) - set(class_names)):
            raise UserError(
                f"{root / place} has the class {_listed(unknown)}, which {root / parts[_TRAIN]} "
                f"lacks: remove it there, or add pictures of it here"
            )
        is_test = None if len(parts) == 1 else part != _TRAIN
        for name in names:
            label = class_names.index(name)
            for path in _files(root / place / name, above=(_place(root), _place(root / place))):
                if path.suffix.lower() not in image_extensions():
                    others[path.suffix.lower() or "no extension"] += 1
                    continue
                relative = path.relative_to(root).as_posix()
                files.append(PictureFile(relative, label, is_test, _version(path)))
        if loose := sum(1 for path in _files(root / place, deep=False) if _is_picture(path)):
            notes.append(
                f"{number_of(loose, 'picture')} directly in {root / place}, in the folder of no "
                f"class, {_LEFT_OUT[loose == 1]}"
            )
        if is_test and not any(file.is_test for file in files):
            raise UserError(
                f"{root / place} has no pictures: put some there, in a folder per class, or remove "
                f"it to have a part of {parts[_TRAIN]} set aside"
            )
    if others:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in others.most_common(_NAMES_SHOWN))
        notes.append(
            f"{number_of(others.total(), 'file')} in {root} without the name of a picture "
            f"{_LEFT_OUT[others.total() == 1]}: {kinds}"
            + (" ..." if len(others) > _NAMES_SHOWN else "")
        )
    return Layout(class_names, tuple(sorted(files, key=lambda file: file.path)), tuple(notes))


def picture_files(folder: Path) -> list[Path]:
    """The files in a folder, and in those below it, that have the name of a picture, sorted."""
    return sorted(path for path in _files(folder) if _is_picture(path))


def _parts(root: Path) -> tuple[dict[str, str], list[str]]:
    """The folders below the root for training and for testing ("." is the root), and notes."""
    folders = _folders(root)
    by_meaning = {name.lower(): name for name in folders}
    tested = [by_meaning[name] for name in _TESTED if name in by_meaning]
    if _TRAIN not in by_meaning:
        if folders and len(tested) == len(folders):
            raise UserError(
                f"{root} has {_listed(tested)} but no folder train: add it, or give the folder "
                f"that holds a folder per class"
            )
        return {_TRAIN: "."}, []
    train, notes = by_meaning[_TRAIN], []
    if len(tested) > 1:
        notes.append(f"{root / tested[0]} is the test split; {_listed(tested[1:])} is not used")
    if rest := [name for name in folders if name not in (train, *tested)]:
        notes.append(f"{root} has {_listed(rest)} beside {train}, which is not used")
    return {_TRAIN: train, **({"test": tested[0]} if tested else {})}, notes


def _check_classes(place: Path, class_names: Sequence[str]) -> None:
    if len(class_names) > 1:
        return
    advice = "put the pictures of each class into a folder of its name"
    if class_names:
        inner = place / class_names[0]
        if len(_folders(inner)) > 1:
            advice = f"did you mean {inner}?"
        raise UserError(
            f"{place} has one folder only, {class_names[0]}, and so one class; two are needed: "
            f"{advice}"
        )
    if any(map(_is_picture, _files(place, deep=False))):
        raise UserError(f"{place} has pictures, but no folders, and so no classes: {advice}")
    raise UserError(f"{place} has no folders, and so no classes: {advice}")


def _folders(place: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    with os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if _counts(entry.name) and entry.is_dir())


def _files(
    place: Path, *, deep: bool = True, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[Path]:
    """The files in a folder, in no order.

    Args:
      place: the folder.
      deep: whether the folders in it are looked into.
      above: folders that hold it; a link to one of them is not followed.
    """
    here = _place(place)
    if here in above:
        return
    with os.scandir(place) as entries:
        found = [entry for entry in entries if _counts(entry.name)]
    for entry in found:
        path = place / entry.name
        if entry.is_dir():
            if deep:
                yield from _files(path, above=(*above, here))
        elif entry.is_file() or not path.exists():  # a link to nothing is named as unreadable
            yield path


def _place(folder: Path) -> tuple[int, int]:
    """What tells a folder apart, by whichever path it is reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _IGNORED


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in image_extensions()


def _version(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (" ..." if len(names) > _NAMES_SHOWN else "")
