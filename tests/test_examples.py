"""The scripts of examples/, run as a person runs them."""

import csv
import os
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

import cnn
from tests.helpers import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a script in this process; gives exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is restored

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def images(number):
    """Dark and bright ones, in turn."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (number, 16, 16, 3), np.uint8)
    pixels[1::2] += 150
    return pixels


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "files").mkdir()
    rows = []
    for i, image in enumerate(images(60)):
        PIL.Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
        split = "test" if i % 5 == 0 else "train"
        rows.append({"file": f"files/{i}.png", "kind": "ab"[i % 2], "split": split})
    return rows


SHORT = ("--epochs", 1, "--batch-size", 8)
COLUMNS = ("--path-column", "file", "--label-column", "kind")


def test_own_csv(run, rows, tmp_path):
    table = tmp_path / "pictures.csv"
    with open(table, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = (*COLUMNS, "--image-size", 8, "--split-column", "split", *SHORT)
    code, out, err = run("own_csv.py", table, *flags, "--workdir", tmp_path / "run")
    assert code == 0, err
    assert "data: pictures, 8x8x3, 2 classes\nimages: 48 for training, 12 for testing\n" in out
    assert out.endswith("% of 12 pictures\n")


def test_own_csv_of_parquet(run, rows, tmp_path):
    """The table is read; a picture that is missing is named, and nothing is trained."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "files" / "7.png").unlink()
    workdir = tmp_path / "run"
    code, out, err = run("own_csv.py", tmp_path / "t.parquet", *COLUMNS, "--workdir", workdir)
    assert (code, out) == (2, "")
    assert err.startswith("error: 1 image (")
    assert "files/7.png: no such file" in err
    assert not workdir.exists()


def test_own_arrays(tmp_path):
    """In a process of its own, from another directory."""
    labels = np.arange(60) % 2
    np.savez(tmp_path / "arrays.npz", images=images(60)[..., 0], labels=labels)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "own_arrays.py"), "arrays.npz",
         *map(str, SHORT), "--workdir", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("% of 12 images\n")
    assert (tmp_path / "run" / "result.json").is_file()


def test_arrays_that_cannot_be_read(run, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    np.save(tmp_path / "one.npy", images(2))
    np.savez(tmp_path / "others.npz", x=images(2), y=np.arange(2))
    np.savez(tmp_path / "objects.npz", images=np.array([{}, None]), labels=np.arange(2))
    np.savez(tmp_path / "words.npz", images=images(2), labels=np.array(["a", "b"]))
    for path in sorted(tmp_path.iterdir()):
        code, _, err = run("own_arrays.py", path, "--workdir", tmp_path / "run")
        assert code == 2
        assert err == (
            f"error: {path} is not an .npz file with numbers as images and labels: write it with "
            f"numpy.savez('{path.stem}', images=..., labels=...)\n"
        )


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        ("path,label\n", "has no rows"),
        ("file,label\na.png,b\n", "has no column 'path'; it has file, label"),
        ("path,label\na.png,b\n", "a.png: no such file"),
        ("path,label\na.png\n", "row 1 of"),
        ("path,label\n\udcff,b\n", "is not a CSV file in UTF-8"),
    ],
)
def test_tables_that_cannot_be_read(content, telling, run, tmp_path):
    (tmp_path / "t.csv").write_text(content, errors="surrogateescape")
    code, _, err = run("own_csv.py", tmp_path / "t.csv", "--workdir", tmp_path / "run")
    assert code == 2
    assert err.startswith("error: ")
    assert telling in err
    assert err.count("\n") == 1


def test_many_seeds(run):
    flags = ("--num-seeds", 2, "--epochs", 1, "--layout", "map")
    code, out, err = run("many_seeds.py", *flags)
    assert code == 0, err
    first, second, mean, std, low, high = map(float, re.findall(r"([\d.]+)%", out))
    assert mean == pytest.approx((first + second) / 2, abs=0.1)
    assert std == pytest.approx(abs(first - second) / 2**0.5, abs=0.1)
    # The 97.5 % quantile of Student's t with one degree of freedom is 12.706.
    assert (low, high) == pytest.approx((mean - 8.985 * std, mean + 8.985 * std), abs=0.1)


def test_a_seed_beside_others_is_its_single_run():
    digits, parts = cnn.load_dataset("digits"), []
    for split, size in ((digits.train, 100), (digits.test, 50)):
        parts.append(cnn.Split(split.images[:size], split.labels[:size]))
    train, test = parts
    few = cnn.Dataset.from_splits("few", train=train, test=test, class_names=digits.class_names)
    script = runpy.run_path(str(EXAMPLES / "many_seeds.py"))
    states, _ = script["train_seeds"](few, [3, 7], 2, "vmap")
    init_key, order_key = jax.random.split(jax.random.key(7))
    state = script["create_state"](few, 2, init_key)
    train_epoch = jax.jit(script["train_epoch"])
    for _ in range(2):  # epochs of three steps
        state, _ = train_epoch(cnn.DeviceSplit.from_split(train), state, order_key)
    logits = jax.jit(lambda state: cnn.predict_step(state, test.images / np.float32(255)))
    other, same = (logits(jax.tree.map(lambda leaf, i=i: leaf[i], states)) for i in range(2))
    alone = logits(state)
    # Not the weights: where the gradient is all but 0, Adam makes a whole step of its rounding.
    assert abs(same - alone).max() < 1e-3  # 3e-5 was seen
    assert abs(other - alone).max() > 0.1


def test_optuna_search(run, tmp_path):
    """Poor trials stop early, and the same command continues the study: here it has no more."""
    flags = ("--epochs", 3, "--study", tmp_path / "new" / "study.log")
    code, out, err = run("optuna_search.py", "--num-trials", 4, *flags)
    assert code == 0, err
    found = re.match(r"4 trials, (\d) of them stopped early; the best has ([\d.]+)%", out)
    assert 1 <= int(found[1]) < 4
    assert float(found[2]) > 60
    assert "--config.optimizer.learning_rate=0.0" in out
    assert run("optuna_search.py", "--num-trials", 4, *flags)[:2] == (0, out)


def test_the_optimizer_of_the_search_is_that_of_a_config():
    create = runpy.run_path(str(EXAMPLES / "optuna_search.py"))["create_optimizer"]
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    schedule = cnn.create_schedule("cosine", 0.1, num_updates=3)
    txs = create(3), cnn.create_optimizer("adamw", schedule, weight_decay=0.5)
    chosen = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.5)}
    states = optax.tree.set(txs[0].init(params), **chosen), txs[1].init(params)
    for _ in range(2):
        steps = [tx.update(params, one, params) for tx, one in zip(txs, states, strict=True)]
        states = [state for _, state in steps]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *(u for u, _ in steps))
