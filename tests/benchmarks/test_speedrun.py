"""Whole seeds as speed runs are published; the original script is a made-up one here."""

import dataclasses
import importlib.util
import itertools
import json
import shutil
import sys

import pytest

import benchmarks.speedrun.__main__ as speedrun
from benchmarks import workers
from benchmarks.arrays import random_dataset, read_arrays, write_arrays
from benchmarks.report import Mean
from benchmarks.speedrun import original, steps
from benchmarks.speedrun.runs import _epochs
from cnn import UserError
from cnn.report.runs import read_runs
from tests.helpers import REPOSITORY

# Prints a table as the scripts do: the seed is 0.9 of an accuracy and so many hundredths.
_SCRIPT = """
import sys
seed = int(sys.argv[1])
print("|  run     |  epoch  |  val_acc  |  tta_val_acc  |  total_time_seconds  |")
for run in ("warmup", str(seed)):
    print(f"|  {run}  |  1  |  0.9  |  |  1.0  |")
    print(f"|  |  eval  |  0.9  |  0.9{seed}  |  2.5  |")
"""


@pytest.fixture
def tiny(tmp_path):
    """A config of one short epoch, with test-time augmentation."""
    path = tmp_path / "tiny.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests import helpers\n"
        "def get_config():\n"
        "    config = helpers.short_config()\n"
        "    config.num_epochs = 1\n"
        '    config.evaluation.tta = "flip"\n'
        "    return config\n"
    )
    return path


@pytest.fixture
def made_up(monkeypatch):
    """An original script that needs no PyTorch; gives the seeds that it was run with."""
    seeds = []

    def command(script, data, variant, seed, runs):
        assert len(read_arrays(data).test) == 360
        seeds.append(seed)
        return [sys.executable, "-c", _SCRIPT, seed.removeprefix("--seed=")]

    monkeypatch.setattr(original, "command", command)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return seeds


def test_seeds_are_kept_and_count_wherever_they_were_made(
    digits, tiny, made_up, tmp_path, monkeypatch, capsys
):
    """Two commands make two seeds beside the original; a third only reads them."""
    monkeypatch.setattr("cnn.training.present_result", lambda *_, **__: None)  # no pictures
    script = tmp_path / "script.py"
    script.write_text("")
    common = ["--config", str(tiny), "--workdir", str(tmp_path / "runs"), "--out", str(tmp_path)]
    speedrun.main([*common, "--seeds=1", "--original", str(script)])
    first = (tmp_path / "runs" / "seed-0" / "result.json").stat()
    speedrun.main([*common, "--seeds=2", "--original", str(script)])
    assert (tmp_path / "runs" / "seed-0" / "result.json").stat().st_mtime == first.st_mtime
    assert made_up == ["--seed=0", "--seed=1"]
    assert "runs in" in capsys.readouterr().out

    record = json.loads((tmp_path / "speedrun_tiny.json").read_text())
    results = [
        json.loads((tmp_path / "runs" / f"seed-{seed}" / "result.json").read_text())
        for seed in (0, 1)
    ]
    for name in ("accuracy", "tta_accuracy"):
        mine = [seed[name] for seed in record["seeds"]]
        assert mine == [result[name.replace("accuracy", "test_accuracy")] for result in results]
    seconds = record["figures"]["seconds of training and last evaluation"]["mean"]
    training = Mean.of([seed["training_seconds"] for seed in record["seeds"]]).mean
    assert seconds == pytest.approx(training + record["evaluation"]["seconds"])
    for seed, result in zip(record["seeds"], results, strict=True):
        assert 0 < seed["training_seconds"] < seed["wall_seconds"] == result["wall_seconds"]
    (runs,) = record["originals"].values()
    assert [(run["seed"], run["tta_accuracy"]) for run in runs] == [(0, 0.90), (1, 0.91)]

    text = (tmp_path / "speedrun_tiny.md").read_text()
    assert "| script.py, channels_last | 2 | 90.50 ± 0.71 % | 90.00 ± 0.00 % | 2.5 |" in text
    assert str(tmp_path) not in text + json.dumps(record)

    elsewhere = [str(tmp_path / "runs" / f"seed-{seed}") for seed in (1, 0)]
    speedrun.main([*common[:2], "--out", str(tmp_path), "--runs", *elsewhere])
    again = json.loads((tmp_path / "speedrun_tiny.json").read_text())
    assert again["seeds"] == record["seeds"]
    assert again["evaluation"] == record["evaluation"]
    assert not again["originals"]


def test_an_epoch_in_which_a_process_began_counts_with_the_speed_of_the_others(trained_run):
    (run,) = read_runs([str(trained_run)])
    speeds = [1.0, 200.0, 100.0, 400.0]
    records = [
        {**run.records[0], "epoch": i + 1, "step": 14 * (i + 1), "images_per_second": speed}
        for i, speed in enumerate(speeds)
    ]
    environments = [{**run.environments[0], "starts": [0, 30]}]
    resumed = dataclasses.replace(run, records=records, environments=environments)
    images = 14 * 96
    seconds = [images / 300, images / 200, images / 300, images / 400]  # 300 is the median of two
    found = [one[1] for one in _epochs(resumed)]
    assert found == pytest.approx(list(itertools.accumulate(seconds)))


def test_so_does_one_in_which_images_of_another_size_began(trained_run):
    """Small images in two epochs and a half: the third epoch has no other like it."""
    (run,) = read_runs([str(trained_run)])
    speeds = [1.0, 800.0, 300.0, 200.0, 100.0]
    records = [
        {**run.records[0], "epoch": i + 1, "step": 14 * (i + 1), "images_per_second": speed}
        for i, speed in enumerate(speeds)
    ]
    config = {**run.config, "resizing": {"scales": [0.5], "until_epochs": [2.5]}}
    resized = dataclasses.replace(run, records=records, config=config)
    images = 14 * 96
    seconds = [images / speed for speed in (800, 800, 300, 200, 100)]
    found = [one[1] for one in _epochs(resized)]
    assert found == pytest.approx(list(itertools.accumulate(seconds)))


def test_other_runs_are_refused_and_unfinished_ones_left_out(
    digits, tiny, trained_run, tmp_path, capsys
):
    with pytest.raises(UserError, match=r"run of another config .*num_epochs: 2\.0 -> 1\.0"):
        speedrun.main(["--config", str(tiny), "--out", str(tmp_path), "--runs", str(trained_run)])
    copy = shutil.copytree(trained_run, tmp_path / "run")
    (copy / "result.json").unlink()
    same = ["--config.num_epochs=2", "--config.evaluation.tta=none"]
    speedrun.main(["--config", str(tiny), *same, "--out", str(tmp_path), "--runs", str(copy)])
    out, err = capsys.readouterr()
    assert "no run is finished yet" in out
    assert "run is not finished: left out" in err


def test_steps_are_timed_in_turns(digits, tiny, tmp_path):
    """Ours in a process of its own beside one that only waits."""
    waits = (
        "import sys, json, time\n"
        "print('{}', flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'seconds': 0.5}), flush=True)\n"
    )
    config = speedrun._settings(["--config", str(tiny)]).config
    taking_part = steps.contenders(config, None, tmp_path, on_gpu=False, batch_size=96)
    env = workers.environment(workers.QUICK_ENV)
    taking_part = [
        steps.Contender(steps.OURS, taking_part[0].command, env),
        steps.Contender("other", [sys.executable, "-c", waits], env),
    ]
    rates = steps.measure(taking_part, batch_size=96, num_steps=3, rounds=2)
    assert rates["other"] == [576.0, 576.0]
    assert len(rates[steps.OURS]) == 2
    assert min(rates[steps.OURS]) > 0
    text = steps.write(tmp_path, "tiny", "line", rates, batch_size=96, num_steps=3, rounds=2)
    assert "| other | 576 (576 to 576) |" in text


def test_what_is_no_script_is_an_input_error(tmp_path):
    with pytest.raises(UserError, match="is not a file; give the path of an airbench script"):
        speedrun.main(["--original", str(tmp_path / "none.py")])


def test_archives_are_read_as_they_were_written(tmp_path):
    data = random_dataset(20, 10)
    write_arrays(tmp_path / "images.npz", data)
    again = read_arrays(tmp_path / "images.npz")
    assert again.fingerprint == data.fingerprint
    (tmp_path / "images.npz").write_text("no")
    with pytest.raises(UserError, match="not a NumPy archive of train_images"):
        read_arrays(tmp_path / "images.npz")


_AIRBENCH = """
import os, sys
with open(sys.argv[0]) as f:
    code = f.read()
import torch
from torch import nn

class CifarLoader:
    def __init__(self, path, train=True, batch_size=500, aug=None):
        data = torch.load(os.path.join(path, "train.pt" if train else "test.pt"),
                          map_location=torch.device("cuda"))
        self.images, self.labels = data["images"], data["labels"]
        self.images = (self.images.half() / 255).permute(0, 3, 1, 2)
        self.images = self.images.to(memory_format=torch.channels_last)
        self.batch_size = batch_size
    def normalize(self, images):
        return images - 0.5
    def __len__(self):
        return len(self.images) // self.batch_size
    def __iter__(self):
        for i in range(len(self)):
            rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
            yield self.normalize(self.images[rows]), self.labels[rows]

def main(run, model):
    starter = torch.cuda.Event(enable_timing=True)
    ender = torch.cuda.Event(enable_timing=True)
    starter.record()
    loader = CifarLoader("cifar10", batch_size=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for inputs, labels in loader:
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    ender.record()
    torch.cuda.synchronize()
    seconds = 1e-3 * starter.elapsed_time(ender)
    print(f"|  {run}  |  eval  |  0.5  |  0.5  |  {seconds:.4f}  |")

if __name__ == "__main__":
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).half().cuda()
    net = net.to(memory_format=torch.channels_last)
    net.compile(mode="max-autotune")
    print("|  run  |  epoch  |  val_acc  |  tta_val_acc  |  time_seconds  |")
    main("warmup", net)
    [main(run, net) for run in range(200)]
"""


def test_a_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    script, archive = tmp_path / "script.py", tmp_path / "images.npz"
    script.write_text(_AIRBENCH)
    write_arrays(archive, random_dataset(40, 20))
    runs = original.run(script, archive, variant="eager", seed=3, runs=2)
    assert [(run.seed, run.accuracy) for run in runs] == [(3, 0.5), (3, 0.5)]
    assert min(run.seconds for run in runs) > 0
    words = original.command(script, archive, "channels_last", "--steps", "--batch-size=5")
    taking_part = [steps.Contender(steps.OURS, words, original.environment())]
    rates = steps.measure(taking_part, batch_size=5, num_steps=3, rounds=2)
    assert min(rates[steps.OURS]) > 0
