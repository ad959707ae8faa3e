"""A damaged checkpoint is reported and never used; the run resumes from another."""

import json
import random
import shutil

import pytest

import cnn
from cnn import CheckpointManager, UserError, digest, train_and_evaluate
from tests.helpers import short_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A run whose newest checkpoints are 25 and 28, and its final digest."""
    config = short_config()
    config.runtime.checkpoint_every_steps = 5
    workdir = tmp_path_factory.mktemp("run")
    state, _ = train_and_evaluate(config, workdir)
    return workdir, digest(state)


@pytest.fixture
def config(config):
    config.runtime.checkpoint_every_steps = 5
    return config


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names_of(workdir):
    folder = workdir / "checkpoints" / "28"
    return [str(path.relative_to(folder)) for path in files_of(folder)]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damages(path):
    """Each way to damage a file: its name and a function."""
    size = path.stat().st_size
    yield "removed", lambda path: path.unlink()
    if size:
        yield "emptied", lambda path: path.write_bytes(b"")
        yield "truncated", truncate
        positions = {0, size // 2, size - 1, *random.Random(size).sample(range(size), min(size, 9))}
        for position in sorted(positions):
            yield f"byte {position} flipped", lambda path, at=position: flip(path, at)
    else:
        yield "written to", lambda path: path.write_bytes(b"\0")


def test_every_damage_to_any_file_of_a_checkpoint_is_noticed(finished, tmp_path):
    workdir, _ = finished
    whole = workdir / "checkpoints" / "28"
    names, tried = names_of(workdir), 0
    assert {"SHA256SUMS", "record.json", "state/_METADATA"} <= set(names)
    assert len(names) >= 8
    folder = tmp_path / "28"
    for name in names:
        for words, damage in damages(whole / name):
            shutil.copytree(whole, folder)
            damage(folder / name)
            with pytest.raises(UserError) as error:
                CheckpointManager(tmp_path).read(28)
            message = str(error.value)
            assert "\n" not in message
            assert f"checkpoint {folder} is damaged: " in message, (name, words)
            assert name in message, words
            shutil.rmtree(folder)
            tried += 1
    assert tried > 10 * len(names)


def test_a_file_too_many_is_noticed(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir / "checkpoints" / "28", tmp_path / "28")
    (tmp_path / "28" / "state" / "d" / "0").write_bytes(b"0")
    with pytest.raises(UserError, match="state/d/0 is not listed"):
        CheckpointManager(tmp_path).read(28)


def reseal(folder):
    """As damage that came before the sums were taken: they say nothing."""
    from cnn.runtime.checksums import write_checksums

    write_checksums(folder)


def test_the_digest_is_of_the_arrays_themselves(finished, tmp_path):
    workdir, _ = finished
    for step in ("25", "28"):
        shutil.copytree(workdir / "checkpoints" / step, tmp_path / step)
    shutil.rmtree(tmp_path / "28" / "state")
    shutil.copytree(tmp_path / "25" / "state", tmp_path / "28" / "state")
    reseal(tmp_path / "28")
    with pytest.raises(UserError, match="its digest does not match"):
        CheckpointManager(tmp_path).read(28)


def test_a_step_under_another_name(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir / "checkpoints" / "28", tmp_path / "30")
    with pytest.raises(UserError, match="its digest does not match"):
        CheckpointManager(tmp_path).read(30)


@pytest.mark.parametrize("finished_before", [True, False])
@pytest.mark.parametrize("name", ["SHA256SUMS", "state/manifest.ocdbt", "record.json"])
def test_the_run_goes_on_from_the_one_before(
    finished, config, tmp_path, capsys, name, finished_before
):
    """A finished run trains again what was lost, to the same bits."""
    workdir, expected = finished
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    if not finished_before:
        (run / "result.json").unlink()
    flip(run / "checkpoints" / "28" / name, 3)
    state, result = train_and_evaluate(config, run)
    out, err = capsys.readouterr()
    (warning,) = err.splitlines()
    assert warning.startswith(
        f"warning: checkpoint {run / 'checkpoints' / '28'} is damaged: {name}"
    )
    assert warning.endswith(
        "the run resumes from step 25, and its next save renames the damaged one to 28.damaged"
    )
    assert "resuming at step 25 of 28" in out
    assert digest(state) == result["digest"] == expected
    assert CheckpointManager(run / "checkpoints").all_steps()[-2:] == [25, 28]
    assert (run / "checkpoints" / "28.damaged" / name).exists()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [14, 28]


@pytest.mark.parametrize("damage", ["flipped", "gone", "folder gone"])
def test_none_left_is_never_a_fresh_start(finished, config, tmp_path, damage):
    workdir, _ = finished
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "result.json").unlink()
    for step in cnn.CheckpointManager(run / "checkpoints").all_steps():
        folder = run / "checkpoints" / str(step)
        if damage == "flipped":
            flip(folder / "record.json", 40)
        else:
            shutil.rmtree(folder)
    if damage == "folder gone":
        (run / "checkpoints").rmdir()
    before = {path: path.stat().st_mtime_ns for path in files_of(run)}
    complaint = "no other is left" if damage == "flipped" else "no checkpoint of it"
    with pytest.raises(UserError, match=complaint) as error:
        train_and_evaluate(config, run)
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in files_of(run)}.items() - before.items() <= {
        (run / ".lock", (run / ".lock").stat().st_mtime_ns)
    }
