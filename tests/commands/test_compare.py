"""`python -m cnn compare` on directories of runs, as `train.py` leaves them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

import cnn
from cnn.config import check_config, to_json_dict
from cnn.statistics import seeds_needed
from tests.helpers import short_config

IMAGES = 1000
WIDE, NARROW = (0.90, 0.92, 0.94), (0.91, 0.95, 0.96)  # accuracies of seeds 0, 1, 2


def write_run(path, accuracy, *, seed=0, rate=1e-3, is_evaluated=False, fingerprint="f" * 64):
    """The files of a finished run that a comparison reads; each model errs on other images."""
    config = short_config()
    config.seed, config.optimizer.learning_rate = seed, rate
    dataset = {"name": "digits", "class_names": ["a", "b"], "fingerprint": fingerprint}
    record = {"step": 28, "epoch": 2, "test_accuracy": accuracy, "test_count": IMAGES}
    result = {"digest": "0" * 64, "num_params": 9, "num_steps": 28, "wall_seconds": 1.0}
    path.mkdir(parents=True)
    documents = {"config": to_json_dict(check_config(config)), "dataset": dataset, "result": result}
    for name, value in documents.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    if is_evaluated:
        write_evaluation(path / "evaluation" / "test", accuracy, dataset, seed)
    return path


def write_evaluation(folder, accuracy, dataset, seed):
    folder.mkdir(parents=True)
    figures = {"split": "test", "tta": "none", "step": 28, "count": IMAGES, "accuracy": accuracy,
               "loss": 0.1, "calibration_error": 0.1, "mean_confidence": 0.9}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(figures))
    labels = np.zeros(IMAGES, np.int64)
    errors = np.random.default_rng(seed).permutation(IMAGES) < round((1 - accuracy) * IMAGES)
    np.savez(
        folder / "predictions.npz",
        logits=np.stack([~errors, errors], axis=-1).astype(np.float32),
        labels=labels,
        class_names=np.array(dataset["class_names"]),
        fingerprint=np.array(dataset["fingerprint"]),
    )
    (folder / "predictions.csv").write_text("confidence\n" + "0.9\n" * IMAGES)


def write_group(path, accuracies, *, setting="", **options):
    """A group of a run for each accuracy; `setting` is that of a point of a sweep."""
    for seed, accuracy in enumerate(accuracies):
        name = f"{setting},seed={seed}".lstrip(",")
        write_run(path / "members" / name, accuracy, seed=seed, **options)
    return path


@pytest.fixture
def groups(tmp_path):
    """Two groups that differ in the learning rate."""
    a = write_group(tmp_path / "a", WIDE, is_evaluated=True)
    b = write_group(tmp_path / "b", NARROW, rate=3e-3, is_evaluated=True)
    return a, b


@pytest.fixture
def compare(command):
    return lambda *flags: command("compare", *flags)


def test_two_groups(compare, groups):
    code, out, err = compare(*groups)
    a, b, fields, field, seeds, images, *pairs, power = out.splitlines()
    expected = stats.ttest_ind(NARROW, WIDE, equal_var=False)
    low, high = 100 * np.array(expected.confidence_interval())
    assert (code, err) == (0, "")
    ends = stats.t.interval(0.95, 2, np.mean(WIDE), stats.sem(WIDE))
    interval = f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f} %"
    accuracy = f"92.00 ± 2.00\N{NO-BREAK SPACE}% (n = 3, 95 % interval {interval})"
    assert a == f"A: test accuracy {accuracy} of {groups[0]}"
    assert b.startswith("B: test accuracy 94.00 ± 2.65")
    assert (fields, field) == (
        "config fields that differ:",
        "  optimizer.learning_rate: A 0.001, B 0.003",
    )
    assert seeds.replace("\N{MINUS SIGN}", "-") == (
        f"over seeds: B - A = +2.00 percentage points, 95 % interval {low:+.2f} to {high:+.2f}, "
        f"p = {expected.pvalue:.2g} (Welch's t test)"
    )
    assert images.startswith("on the same 1,000 images: B - A = +2.00 percentage points, 95 % int")
    assert [pair.split(":")[0] for pair in pairs] == ["  seed 0", "  seed 1", "  seed 2"]
    # The errors of the more accurate model are among those of the other one.
    assert "only A right 0, only B right 10, McNemar's p = 0.002" in pairs[0]
    std = math.sqrt((np.var(WIDE, ddof=1) + np.var(NARROW, ddof=1)) / 2)
    assert (
        f"(std 2.35), {seeds_needed(std, 0.001):,} seeds of each show a difference of 0.1 " in power
    )


def test_json(compare, groups):
    code, out, _ = compare(*groups, "--json", "--difference", "5")
    found = json.loads(out)
    assert code == 0
    assert [group["settings"] for group in found["groups"]] == [
        {"optimizer.learning_rate": 0.001},
        {"optimizer.learning_rate": 0.003},
    ]
    expected = stats.ttest_ind(NARROW, WIDE, equal_var=False)
    comparison, power = found["comparison"], found["power"]
    assert comparison["difference"] == pytest.approx(0.02)
    assert comparison["interval_over_seeds"] == pytest.approx([*expected.confidence_interval()])
    assert comparison["p_value_over_seeds"] == pytest.approx(expected.pvalue)
    assert comparison["same_images"]["difference"] == pytest.approx(0.02)
    assert len(comparison["pairs"]) == 3
    assert power["seeds_needed"] == seeds_needed(power["std_test_accuracy"], 0.05)
    assert seeds_needed(power["std_test_accuracy"], power["detectable_difference"] + 1e-9) == 3


def test_members_without_result_are_left_out(compare, command, groups):
    (groups[0] / "members" / "seed=1" / "result.json").unlink()
    (groups[0] / "members" / "seed=2" / "result.json").unlink()
    warning = (
        f"warning: 2 of 3 members of {groups[0]} left out: without a result, as they diverged or "
        f"are not finished\n"
    )
    code, out, err = compare(*groups)
    assert (code, err) == (0, warning)
    assert "and no interval: one run of A does not show how seeds vary" in out
    assert "(std 2.65), " in out  # that of B
    assert "of each that there are" not in out
    code, out, err = command("report", *groups, "--output", "p.html", "--json")
    assert (code, err) == (0, warning)
    assert [group["count"] for group in json.loads(out)["groups"]] == [1, 3]
    (groups[0] / "members" / "seed=0" / "result.json").unlink()
    code, _, err = compare(*groups)
    assert code == 2
    assert err == f"error: no member of {groups[0]} has a result: wait for one, or train on\n"


def test_one_run_each(compare, tmp_path):
    runs = [
        write_run(tmp_path / "a", 0.90, is_evaluated=True),
        write_run(tmp_path / "b", 0.95, seed=3, is_evaluated=True),
    ]
    (runs[1] / "result.json").unlink()
    code, out, err = compare(*runs)
    assert (code, err.count("\n")) == (0, 1)
    assert f"{runs[1]} is not finished: its accuracy is that after epoch 2 of 2" in err
    assert "A: test accuracy 90.00\N{NO-BREAK SPACE}% (n = 1) of " in out
    assert "the configs are the same" in out
    assert "+5.00 percentage points, and no interval: one run of A and of B does not show" in out
    assert "on the same 1,000 images: B - A = +5.00 percentage points, 95 % interval +" in out
    assert "  seeds 0 and 3: +5.00, " in out
    assert "how many seeds would show a difference is not known" in out


def test_missing_predictions(compare, tmp_path, monkeypatch):
    a = write_run(tmp_path / "a", 0.90)
    b = write_group(tmp_path / "my b", [0.91, 0.91])
    monkeypatch.chdir(tmp_path)
    _, out, _ = compare(a, b)
    said = "to compare image by image; this stores them:"
    names = "a 'my b/members/seed=0' 'my b/members/seed=1'"
    assert f"no predictions of 3 runs {said}\n  for run in {names}; do python -m cnn eval" in out
    _, out, _ = compare(a, write_run(tmp_path / "c", 0.91, is_evaluated=True))
    assert f"no predictions of 1 run {said}\n  python -m cnn evaluate a\n" in out


def test_equal_accuracies_are_no_certainty(compare, tmp_path):
    _, out, _ = compare(*(write_group(tmp_path / f"{x}", [x, x]) for x in (0.9, 0.91)))
    assert "+1.00 percentage points, and no interval: the runs of each have the very same" in out
    assert "p <" not in out
    assert "no spread over seeds was seen" in out


def test_other_images_are_not_compared(compare, tmp_path, groups):
    _, out, _ = compare(groups[0], write_run(tmp_path / "c", 0.95, fingerprint="other"))
    assert out.endswith("not compared: A and B were tested on different images\n")


def test_a_point_of_a_sweep_is_a_side(compare, command, tmp_path):
    sweep = tmp_path / "sweep"
    names = [f"optimizer.learning_rate={rate:g}" for rate in (1e-3, 3e-3)]
    write_group(sweep, WIDE, setting=names[0])
    write_group(sweep, NARROW, setting=names[1], rate=3e-3)
    points = [sweep / "members" / name for name in names]
    code, out, err = compare(sweep, points[0])
    assert (code, out) == (2, "")
    assert err == (
        f"error: {sweep} holds runs of 2 settings, and a side of a comparison is of one; choose "
        f"one of {points[0]}, {points[1]}\n"
    )
    code, out, _ = compare(*points, "--json")
    assert code == 0
    assert [group["count"] for group in json.loads(out)["groups"]] == [3, 3]
    assert json.loads(out)["comparison"]["difference"] == pytest.approx(0.02)
    code, out, _ = command("report", sweep, "--output", "p.html")
    assert code == 0
    assert "B - A: +2.00 percentage points" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a"], "required: B"),
        (["a", "a"], "is given twice"),
        (["a", "none"], "none does not exist"),
        (["a", "a/members"], "is not a run directory"),
        (["a", "a/members/lr=1"], "lr=1 does not exist"),
        (["a", "b", "--difference", "0"], "--difference=0.0 must be more than 0"),
        (["a", "b", "--difference=nan"], "--difference=nan must be more than 0"),
        (["a", "b", "--difference=1e-9"], "too small to be shown"),
        (["a", "b", "--difference=x"], "invalid float value"),
    ],
)
def test_bad_flags(compare, groups, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = compare(*flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["evaluate", "predict", "export"])
def test_commands_of_one_run_name_the_members_of_a_group(command, groups, name):
    images = [groups[0] / "members"] if name == "predict" else []
    (groups[0] / "members" / "x.png").write_bytes(b"")
    code, out, err = command(name, groups[0], *images)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {groups[0]} is a group of 3 runs; choose one, such as "
        f"{groups[0] / 'members' / 'seed=0'}\n"
    )


def test_weights_are_those_of_one_run(groups):
    with pytest.raises(cnn.UserError, match="is a group of 3 runs; choose one, such as"):
        cnn.transfer.find_source(str(groups[0]))
