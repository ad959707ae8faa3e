"""Runs an original airbench script, given by its path, in a process of its own; needs PyTorch.

    python -m benchmarks.speedrun.original_worker SCRIPT --data FILE.npz --runs N

The script's own code runs and prints its own tables; only its last block, which calls `main` again
and again, ends after `--runs` calls. It finds the images of the archive in the place where it keeps
its download. With `--steps` it answers commands: {"do": "sample", "steps": n} trains n steps of its
own loop on a few batches of the first images, without augmentation.

Where there is no GPU, what the script asks of one is done by the CPU in float32. There a variant is
"eager", "channels_last" (as the scripts lay out memory) or "compile" (that too, by
`torch.compile`), and the script's warm-up run, which compiles, is left out.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.dialogue import answering, commands

_WARM_UP = "warmup"  # the number of the run by which the scripts compile
_NUM_BATCHES = 4
_ENDLESS = 10**6  # steps in an epoch: so the schedules stay at their beginnings


class _Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Notes the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds from this event to another."""
        return 1e3 * (other.at - self.at)


def use_cpu(variant: str) -> None:
    """Has PyTorch do on the CPU, in float32, what is asked of a GPU in other precisions."""
    load, compiled = torch.load, torch.compile

    def same(self: Any, *_: Any, **__: Any) -> Any:
        return self

    def not_compiled(model: Any = None, **_: Any) -> Any:
        if model is None:
            return not_compiled
        if isinstance(model, nn.Module):
            object.__setattr__(model, "_orig_mod", model)  # as the scripts reach the module
        return model

    def set_all(owners: tuple[Any, ...], **values: Any) -> None:
        for owner in owners:
            for name, value in values.items():
                setattr(owner, name, value)

    both = (torch.Tensor, nn.Module)
    set_all((torch.cuda,), Event=_Event, synchronize=lambda *_: None)
    set_all(both, cuda=same)
    for owner in both:
        set_all((owner,), half=owner.float, bfloat16=owner.float)
    set_all((torch,), load=lambda path, **_: load(path, map_location="cpu"))
    if variant == "compile":
        # Its mode "max-autotune" is for GPUs.
        set_all((torch,), compile=lambda model=None, **_: compiled(model))
        whole = nn.Module.compile
        set_all((nn.Module,), compile=lambda self, **_: whole(self))
    else:
        set_all((torch,), compile=not_compiled)
        set_all((nn.Module,), compile=same)
    if variant == "eager":
        set_all(both, to=_without_layout(torch.Tensor.to, nn.Module.to))


def _without_layout(of_tensor: Callable[..., Any], of_module: Callable[..., Any]) -> Any:
    """`to` without its argument `memory_format`."""

    def to(self: Any, *arguments: Any, memory_format: Any = None, **options: Any) -> Any:
        move = of_module if isinstance(self, nn.Module) else of_tensor
        return move(self, *arguments, **options) if arguments or options else self

    return to


def load_script(path: Path) -> tuple[dict[str, Any], Any]:
    """Executes a script up to its last block; returns its names, and that block, compiled."""
    tree = ast.parse(path.read_text(), str(path))
    *body, last = tree.body
    if not isinstance(last, ast.If):
        raise SystemExit(f"{path.name} does not end with a block `if __name__ == '__main__'`")
    module = types.ModuleType("original")
    sys.modules[module.__name__] = module
    sys.argv = [str(path)]  # the scripts read their own text

    def compiled(statements: list[ast.stmt]) -> Any:
        return compile(ast.Module(statements, []), str(path), "exec")

    exec(compiled(body), module.__dict__)
    return module.__dict__, compiled(last.body)


def train(names: dict[str, Any], block: Any, num_runs: int, *, skip_warm_up: bool) -> None:
    """Runs the script's last block until so many runs are finished."""
    main, left = names["main"], num_runs

    def counted(run: Any, *arguments: Any) -> Any:
        nonlocal left
        if run == _WARM_UP and skip_warm_up:
            return None
        if run != _WARM_UP:
            if not left:
                raise SystemExit
            left -= 1
        result = main(run, *arguments)
        sys.stdout.flush()
        return result

    names["main"] = counted
    exec(block, names)


def serve_steps(
    names: dict[str, Any], block: Any, batch_size: int, answer: Callable[..., None]
) -> None:
    """Has the script's own loop train for as long as commands ask for steps."""
    if (loader := names.get("CifarLoader")) is None:
        raise SystemExit("--steps needs a script with a CifarLoader, which this one has not")

    class Repeated(loader):
        def __len__(self) -> int:
            return _ENDLESS

        def __iter__(self) -> Iterator[Any]:
            parts = [slice(i * batch_size, (i + 1) * batch_size) for i in range(_NUM_BATCHES)]
            # As the script's augmentation gives them: in the order of NCHW.
            batches = [
                (self.normalize(self.images[part]).contiguous(), self.labels[part])
                for part in parts
            ]
            answer({"ready": True})
            for command in commands():
                torch.cuda.synchronize()
                begun = time.perf_counter()
                for step in range(command["steps"]):
                    yield batches[step % _NUM_BATCHES]
                torch.cuda.synchronize()
                answer({"seconds": time.perf_counter() - begun})
            raise SystemExit

    names["CifarLoader"] = Repeated
    exec(block, names)


def write_images(archive: Path, folder: Path) -> None:
    """Writes the images of an archive where the scripts keep their download."""
    folder.mkdir()
    with np.load(archive) as held:
        for name, part in {"train": "train", "test": "test"}.items():
            images = torch.from_numpy(held[f"{part}_images"])
            labels = torch.from_numpy(held[f"{part}_labels"].astype(np.int64))
            record = {"images": images, "labels": labels, "classes": list("0123456789")}
            torch.save(record, folder / f"{name}.pt")


def main() -> None:
    """Flags -> the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("script", type=Path)
    add("--data", type=Path, required=True)
    add("--variant", default="channels_last")
    add("--seed", type=int, default=0)
    add("--runs", type=int, default=1)
    add("--steps", action="store_true")
    add("--batch-size", type=int)
    flags = parser.parse_args()
    answer = answering() if flags.steps else print
    script, data = flags.script.resolve(), flags.data.resolve()
    torch.manual_seed(flags.seed)
    random.seed(flags.seed)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        use_cpu(flags.variant)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write_images(data, Path("cifar10"))
        names, block = load_script(script)
        if flags.steps:
            serve_steps(names, block, flags.batch_size, answer)
        else:
            train(names, block, flags.runs, skip_warm_up=not on_gpu)


if __name__ == "__main__":
    main()
