import json
import shutil

import jax
import numpy as np
import pytest

import cnn
from cnn import UserError, digest, train_and_evaluate
from cnn.config import check_config, to_json_dict
from cnn.experiment import create_experiment
from tests.helpers import OPTIMIZED, Killed, kill_at, records_of, short_config, watch_calls


def without_speed(record):
    return {name: value for name, value in record.items() if name != "images_per_second"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """One undisturbed run, for all tests that only look."""
    workdir = tmp_path_factory.mktemp("run")
    state, result = train_and_evaluate(short_config(), workdir)
    return workdir, state, result


def test_the_run_directory_explains_itself(finished):
    workdir, state, result = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        ".lock", "checkpoints", "config.json", "curves.png", "dataset.json", "environment.json",
        "metrics.jsonl", "result.json", "samples.png",
    }  # fmt: skip
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 96
    assert json.loads((workdir / "environment.json").read_text())["devices"] == ["cpu", "cpu"]
    assert result["test_count"] == 360
    assert result["num_steps"] == int(state.step) == 28
    assert result["digest"] == digest(state)
    assert result["num_params"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    for name in ("curves.png", "samples.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_each_epoch_has_a_record(finished):
    workdir, _, result = finished
    first, second = records_of(workdir)
    assert (first["step"], second["step"]) == (14, 28)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["train_loss"] < first["train_loss"]
    assert second["test_accuracy"] == result["test_accuracy"]
    assert result["best_test_accuracy"] == max(r["test_accuracy"] for r in (first, second))
    assert second["learning_rate"] == pytest.approx(1e-3)
    assert first["images_per_second"] > 0


def test_a_finished_run_says_so_and_is_left_alone(finished, capsys, config):
    workdir, state, result = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    again, same = train_and_evaluate(config, workdir)
    assert "finished before" in capsys.readouterr().out
    assert (digest(again), same) == (digest(state), result)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_another_config_in_the_same_directory_is_refused(finished, config):
    workdir, *_ = finished
    config.seed = 1
    config.optimizer.learning_rate = 1e-2
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, workdir)
    assert "optimizer.learning_rate: 0.001 -> 0.01; seed: 0 -> 1" in str(error.value)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(finished, config, tmp_path):
    _, state, _ = finished
    again, _ = train_and_evaluate(config, tmp_path / "again")
    assert digest(again) == digest(state)
    config.seed = 1
    other, _ = train_and_evaluate(config, tmp_path / "other")
    assert digest(other) != digest(state)


@pytest.mark.parametrize(
    ("steps", "steps_per_execution"), [(5, 1), (14, 1), (17, 1), (28, 1), (15, 0), (20, 3)]
)
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    finished, config, tmp_path, monkeypatch, capsys, steps, steps_per_execution
):
    """Stopped in the first epoch, at its end, in the second and at its end, and continued."""
    workdir, state, result = finished
    config.runtime.checkpoint_every_steps = 5 if steps < 28 else 0
    config.runtime.steps_per_execution = steps_per_execution

    def kill(calls):
        if sum(calls[:-1]) >= steps:
            raise Killed

    def kill_before_the_end(*args):
        raise Killed

    with monkeypatch.context() as patch:
        watch_calls(patch, before=kill)
        patch.setattr(cnn.runs, "final_result", kill_before_the_end)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path)
    capsys.readouterr()
    resumed, resumed_result = train_and_evaluate(config, tmp_path)
    taken_up = {5: 5, 14: 14, 15: 15, 17: 15, 20: 20, 28: None}[steps]
    if taken_up:
        assert f"resuming at step {taken_up} of 28" in capsys.readouterr().out
    assert digest(resumed) == digest(state)
    assert [without_speed(record) for record in records_of(tmp_path)] == [
        without_speed(record) for record in records_of(workdir)
    ]
    for name in ("test_accuracy", "test_loss", "train_loss", "best_test_accuracy", "digest"):
        assert resumed_result[name] == result[name]
    best = result["best_epoch"] * 14
    previous = 14 if steps == 28 else 25
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"28", str(previous), str(best)}


def test_steps_per_call_change_no_bit(config, tmp_path, monkeypatch):
    """By default 14, those of an epoch; 5 do not divide these."""
    optimized = jax.jit(cnn.train_steps, donate_argnames="state", compiler_options=OPTIMIZED)
    monkeypatch.setattr(cnn.execution, "_train_steps", optimized)
    outcomes = []
    for config.runtime.steps_per_execution in (0, 1, 5):
        workdir = tmp_path / str(config.runtime.steps_per_execution)
        state, _ = train_and_evaluate(config, workdir)
        outcomes.append((digest(state), [without_speed(record) for record in records_of(workdir)]))
    assert outcomes == [outcomes[0]] * 3


def test_off_the_cpu_the_compiler_knows_the_number_of_steps(
    finished, config, tmp_path, monkeypatch
):
    _, state, _ = finished
    config.runtime.steps_per_execution = 5
    original, counts = cnn.execution._train_known_steps, []

    def note(state, batches, count):
        counts.append(count)
        return original(state, batches, count)

    class OffTheCpu(cnn.execution.TrainSteps):
        _compiles_each_length = True

        def __setattr__(self, name, value):
            if name != "_compiles_each_length":
                super().__setattr__(name, value)

    monkeypatch.setattr(cnn.training, "compile_train_steps", OffTheCpu)
    monkeypatch.setattr(cnn.execution, "_train_known_steps", note)
    other, _ = train_and_evaluate(config, tmp_path)
    assert counts == [5, 5, 4] * 2
    for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_divide_uses_fewer_devices_and_says_so(config, tmp_path, capsys):
    config.batch_size, config.runtime.num_devices, config.num_epochs = 99, 4, 1
    train_and_evaluate(config, tmp_path)
    said = capsys.readouterr().out
    assert "devices: 3 x cpu, 33 images each per step" in said
    assert "batch_size=99 does not divide evenly over 4 devices; 1 stay idle" in said


def test_everything_that_a_config_can_choose(config, tmp_path):
    config.optimizer.name = "sgd"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.grad_clip_norm = 1.0
    config.optimizer.grad_accumulation_steps = 2
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 0.5
    config.model.dtype = "bfloat16"
    config.loss.label_smoothing = 0.1
    config.dataset.normalization = "standardize"
    _, result = train_and_evaluate(config, tmp_path)
    first, second = records_of(tmp_path)
    # 14 updates in all, 4 of them warm-up; the last one is number 13, counted from 0.
    # Float32, and 1 + cos cancels all but a twentieth.
    expected = 1e-3 * 0.5 * (1 + np.cos(0.9 * np.pi))
    assert second["learning_rate"] == pytest.approx(expected, rel=1e-5)
    assert second["train_loss"] < first["train_loss"]
    assert np.isfinite(result["test_loss"])


def test_tensorboard_shows_each_step_once_and_from_the_first(config, tmp_path, monkeypatch):
    """Turned on after the first epoch, and killed between the second record and its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(calls):
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        watch_calls(patch, before=kill)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path)
    config.runtime.tensorboard = True
    with pytest.raises(Killed):
        train_and_evaluate(config, tmp_path, writers=[kill_at(28)])
    for _ in range(2):  # and turned on when the run is finished
        train_and_evaluate(config, tmp_path)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        shutil.rmtree(tmp_path / "tensorboard")
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("test_loss")] == [
        (record["step"], pytest.approx(record["test_loss"], rel=1e-6))
        for record in records_of(tmp_path)
    ]


def test_runs_that_differ_in_the_seed_compile_nothing_anew(config, tmp_path):
    compiled = []

    def note(event, _, **about):
        if event.endswith("backend_compile_duration"):
            compiled.append(about.get("fun_name"))

    config.num_epochs = 1
    train_and_evaluate(config, tmp_path / "0")
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for config.seed in (1, 2):
            train_and_evaluate(config, tmp_path / str(config.seed))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def test_tensorboard_that_is_not_installed_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config.runtime.tensorboard = True
    with pytest.raises(UserError, match=r"pip install '\.\[tensorboard\]'"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("batch_size", 1438, "batch_size=1438 must lie between 1 and 1,437"),
        ("model.padding", "VALID", "8x8 pixels are too small"),
        ("dataset.name", "digitz", "digits"),
        ("runtime.platform", "tpu", "finds no TPU"),
    ],
)
def test_what_cannot_work_leaves_no_directory(config, tmp_path, field, value, complaint):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=complaint):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_work_directory_that_is_a_file(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is not a writable directory"):
        train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_work_directory_without_permission(config):
    with pytest.raises(UserError, match="/proc/nowhere cannot be written"):
        train_and_evaluate(config, "/proc/nowhere")


@pytest.fixture
def unfinished(config, tmp_path, monkeypatch):
    """The directory of a run that was killed just before its end."""
    config.num_epochs = 1
    with monkeypatch.context() as patch:
        patch.setattr(cnn.runs, "final_result", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path)
    return tmp_path


def test_a_checkpoint_holds_the_config_and_the_records(unfinished, config):
    with cnn.CheckpointManager(unfinished / "checkpoints") as checkpoints:
        _, record = checkpoints.read(14)
    assert record["config"] == to_json_dict(check_config(config))
    assert record["records"] == records_of(unfinished)


def test_a_lost_metrics_file_comes_back(unfinished, config):
    before = (unfinished / "metrics.jsonl").read_text()
    (unfinished / "metrics.jsonl").unlink()
    train_and_evaluate(config, unfinished)
    assert (unfinished / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("result.json", "3"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", "{}\n"),
    ],
)
def test_damaged_files_of_a_run(tmp_path, config, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        train_and_evaluate(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_result_without_its_checkpoints(finished, config, tmp_path):
    workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(
        UserError, match=r"holds a run, but .*checkpoints holds no checkpoint of it"
    ):
        train_and_evaluate(config, tmp_path / "run")


def test_the_schedule_is_the_one_the_optimizer_follows(config, digits):
    """Four warm-up updates from 0: the first changes nothing, the second something."""
    config.schedule.warmup_epochs = 4 / 14
    plan = create_experiment(check_config(config), jax.devices()[:1])
    start = plan.initial_state()
    batch = {
        "image": jax.numpy.asarray(digits.train.images[:96] / np.float32(255)),
        "label": digits.train.labels[:96],
    }
    train_step = jax.jit(cnn.train_step)
    once, _ = train_step(start, batch)
    twice, _ = train_step(once, batch)
    kernels = [np.asarray(s.params["Dense_0"]["kernel"]) for s in (start, once, twice)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    # Adam moves each weight by about the learning rate, here a quarter of 1e-3.
    assert 1e-4 < np.abs(kernels[2] - kernels[1]).max() < 3e-4
    assert plan.learning_rate(2, twice.opt_state) == pytest.approx(2.5e-4)


def test_an_accumulation_longer_than_the_run(config, tmp_path):
    config.optimizer.grad_accumulation_steps = 29
    with pytest.raises(UserError, match="grad_accumulation_steps=29 is more than the 28 steps"):
        train_and_evaluate(config, tmp_path)


def test_a_run_goes_on_with_other_devices(config, tmp_path, monkeypatch, capsys):
    """After the second record, before its checkpoint: that record is made again."""
    with pytest.raises(Killed):
        train_and_evaluate(config, tmp_path, writers=[kill_at(28)])
    first, lost = records_of(tmp_path)
    config.runtime.num_devices = 4
    tested = cnn.Metrics({"loss": 1.0, "accuracy": 1.0}, 1)
    monkeypatch.setattr("cnn.runs.evaluate", lambda *_, **__: tested)
    _, result = train_and_evaluate(config, tmp_path)
    said = capsys.readouterr().out
    assert (
        "note: resuming on 4 x cpu (was 2 x cpu): same state, but later steps may differ by "
        "rounding"
    ) in said
    environment = json.loads((tmp_path / "environment.json").read_text())
    (before,) = environment.pop("earlier")
    assert (len(before["devices"]), before["starts"]) == (2, [0])
    assert (len(environment["devices"]), environment["starts"]) == (4, [14])
    assert json.loads((tmp_path / "config.json").read_text())["runtime"]["num_devices"] == 4
    kept, made = records_of(tmp_path)
    assert kept == first
    assert (lost["step"], made["step"]) == (28, 28)
    assert made["test_count"] == result["test_count"] == 1
    assert made["train_loss"] == pytest.approx(lost["train_loss"], rel=1e-4)


def test_other_images_under_the_same_name_are_refused(unfinished, config, digits, monkeypatch):
    images = np.array(digits.train.images)
    images[0, 0, 0, 0] ^= 1
    changed = cnn.Dataset.from_splits(
        "digits",
        train=cnn.Split(images, digits.train.labels),
        test=digits.test,
        class_names=digits.class_names,
    )
    monkeypatch.setattr("cnn.experiment.load_dataset", lambda *_, **__: changed)
    with pytest.raises(UserError, match="other digits images than those found now"):
        train_and_evaluate(config, unfinished)


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "config.json"])
def test_what_is_left_of_a_run_is_no_empty_directory(finished, config, tmp_path, name):
    """Else the figures of the old run would stand beside the digest of a new one."""
    workdir, *_ = finished
    shutil.copy(workdir / name, tmp_path)
    with pytest.raises(UserError, match="no checkpoint of it"):
        train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_finished_run_whose_result_is_lost_finishes_again(finished, config, tmp_path):
    workdir, state, result = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "config.json").unlink()
    again, other = train_and_evaluate(config, tmp_path / "run")
    assert digest(again) == digest(state) == other["digest"]
    assert other["best_test_accuracy"] == result["best_test_accuracy"]
    config.seed = 1
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=r"are of another config \(seed: 0 -> 1\)"):
        train_and_evaluate(config, tmp_path / "run")
