"""python -m cnn export, as a user runs it, and its files in processes without cnn."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

import cnn
from cnn import inference
from cnn.__main__ import main
from cnn.errors import UserError
from cnn.export import check, program, weights
from cnn.export.onnx_graph import onnx
from tests.helpers import REPOSITORY, short_config

FILES = ["README.md", "config.json", "model.onnx", "model.safetensors", "model.stablehlo"]


def export(run, *flags, **variables):
    command = [sys.executable, "-W", "error", "-m", "cnn", "export", str(run), *map(str, flags)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **variables}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, own_home):
    """A network with batch statistics, trained for one epoch."""
    config = short_config()
    config.model = cnn.load_config(REPOSITORY / "configs" / "fast_cpu.py").model
    config.model.update(patch_size=2, patch_features=4, features=(4,), hidden_features=8)
    config.dataset.normalization = "standardize"
    config.num_epochs = 1
    folder = tmp_path_factory.mktemp("runs") / "run"
    cnn.train_and_evaluate(config, folder)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """The folder of all files, and the output of the command."""
    done = export(run, "--json")
    assert done.returncode == 0, done.stderr
    return run / "export", json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def logits(run):
    return inference.load_run(run, platform="cpu").logits(cnn.load_dataset("digits").test.images)


def outside(code, folder, *blocked):
    """Runs code in a process that has only the exported files; `images` are the test images."""
    script = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in blocked)
    script += "import numpy as np\nimages = np.load('images.npy')\n"
    script += code + "\nnp.save('logits.npy', logits)\n"
    np.save(folder / "images.npy", cnn.load_dataset("digits").test.images)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


def test_all_files_are_equal_to_the_run(exported, digits):
    folder, result, err = exported
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert result["passed"]
    assert result["checked_on"] == "test images of digits"
    for name in ("model.stablehlo", "model.onnx"):
        checked = result["files"][name]["check"]
        assert checked["images"] == len(digits.test)
        assert checked["other_classes"] == 0
        assert checked["largest_difference"] <= checked["bound"] < 1e-2
        assert result["files"][name]["bytes"] == (folder / name).stat().st_size
    # Nothing of the converters, only our own tasks.
    assert re.sub(r"(?m)^[a-z0-9 .]+( \.\.\..*|: [\d.]+ s)\n", "", err) == ""


@pytest.mark.parametrize(("name", "blocked"), [("stablehlo", "flax"), ("onnx", "jax")])
def test_the_code_of_the_card(exported, logits, tmp_path, name, blocked):
    card = (exported[0] / "README.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if name in c)
    shutil.copy(exported[0] / f"model.{name}", tmp_path)
    found = outside(code, tmp_path, "cnn", blocked)
    np.testing.assert_array_equal(found.argmax(-1), logits.argmax(-1))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-4)


def test_the_docs_load_each_file(exported, tmp_path, logits):
    text = (REPOSITORY / "docs" / "export.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    folder = shutil.copytree(exported[0], tmp_path / "checkpoints" / "digits" / "export")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    found = outside(code, tmp_path, "cnn")
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-4)


def test_weights_and_config(exported, run):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    found, model = load_file(exported[0] / "model.safetensors"), inference.load_run(run)
    np.testing.assert_array_equal(
        found["params.Conv_0.kernel"], model.variables["params"]["Conv_0"]["kernel"]
    )
    assert "batch_stats.patch_norm.mean" in found
    assert len(found) == len(jax.tree.leaves(model.variables))
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["id2label"]["3"] == "3"
    assert config["num_labels"] == 10
    np.testing.assert_allclose(config["normalization"]["mean"], model.normalization[0])
    assert cnn.models.create_model(num_classes=10, **config["model"]) == model.model


def test_the_card_says_what_was_measured(exported, run):
    card = (exported[0] / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == "image-classification"
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "accuracy", "value": pytest.approx(result["test_accuracy"])}
    assert f"{result['test_accuracy']:.2%} of {result['test_count']} images" in card
    assert result["digest"] in card
    assert f"{result['num_params']:,}" in card
    assert str(run) not in card  # nor other folders of this machine
    assert "FAILED" not in card


def test_the_hub_reads_the_card(exported):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(exported[0] / "README.md").data
    assert data.library_name == "jax"
    (result,) = data.eval_results
    assert result.metric_type == "accuracy"


def test_stablehlo_of_any_batch_size(run, logits, digits, monkeypatch):
    monkeypatch.setattr(program, "_VALUES_PER_PART", 64 * 8 * 8)
    model = inference.load_run(run, platform="cpu")
    exported = jax.export.deserialize(bytearray(program.stablehlo(model)))
    assert exported.platforms == program.PLATFORMS
    for batch in (1, 64, 200):
        found = jax.jit(exported.call)(digits.test.images[:batch])
        np.testing.assert_allclose(found, logits[:batch], rtol=1e-5, atol=1e-4)


@pytest.fixture
def in_process(capfd):
    def call(*words):
        capfd.readouterr()
        code = main(["export", *map(str, words)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
    monkeypatch.setattr("cnn.__main__.raise_on_signals", lambda: None)


def test_a_file_that_differs_is_marked_and_exit_code_1(run, tmp_path, in_process, monkeypatch):
    damaged = {**weights.named_arrays(inference.load_run(run))}
    damaged["params.Conv_0.kernel"] = damaged["params.Conv_0.kernel"] + 1
    real = weights.named_arrays
    monkeypatch.setattr(weights, "named_arrays", lambda run: damaged)
    made = weights.safetensors(inference.load_run(run))
    monkeypatch.setattr(weights, "named_arrays", real)
    formats = {"safetensors": (lambda run: made, ("safetensors",))}
    monkeypatch.setattr("cnn.commands.export._FORMATS", formats)
    code, out, _ = in_process(run, "--output", tmp_path, "--format=safetensors")
    assert code == 1
    assert re.search(r"FAILED: \d+ arrays differ from the checkpoint", out)
    card = (tmp_path / "README.md").read_text()
    assert "**Do not use model.safetensors**" in card
    assert "**FAILED**" in card
    assert (tmp_path / "model.safetensors").exists()


def test_without_the_check(run, tmp_path, in_process):
    code, out, _ = in_process(
        run, "--output", tmp_path, "--format=stablehlo", "--no-check", "--checkpoint=best"
    )
    assert code == 0
    assert re.match(r"model\.stablehlo +0\.\d\d MB\nsee ", out)
    assert "not checked" in (tmp_path / "README.md").read_text()


def test_random_images_where_the_dataset_is_not(run, tmp_path, in_process, monkeypatch):
    def refuse(run):
        raise UserError("it is gone")

    monkeypatch.setattr("cnn.commands.export.run_dataset", refuse)
    code, out, err = in_process(run, "--output", tmp_path, "--format=stablehlo")
    assert code == 0
    assert "equal classes on 1,000 images" in out
    assert "warning: the files are compared on 1,000 random images, as it is gone" in err
    assert "on random images" in (tmp_path / "README.md").read_text()


def test_nothing_is_written_when_a_converter_fails(run, tmp_path, monkeypatch):
    class Broken:
        @staticmethod
        def to_onnx(*_, **__):
            print("noise")
            raise NotImplementedError("no plugin for fancy_op\nmore")

    monkeypatch.setitem(sys.modules, "jax2onnx", Broken)
    with pytest.raises(UserError, match=r"jax2onnx cannot translate DctCNN .*no plugin for fancy"):
        onnx(inference.load_run(run))
    Broken.__spec__ = None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="leave onnx out of --format"):
        main(["export", str(run), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["jax2onnx", "onnxruntime", "safetensors"])
def test_an_extra_that_is_missing(run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs {package}, which is not installed: pip install -e '\.\[export\]'"
    with pytest.raises(UserError, match=message):
        main(["export", str(run), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onix"], "--format asks for 'onix'; known: stablehlo, onnx, safetensors"),
        (["--format=,"], "--format asks for nothing"),
        (["--checkpoint=7"], "no checkpoint '7'"),
        (["--output=/dev/null/x"], "cannot be written"),
        (["--platform=gpu"], "unrecognized"),
    ],
)
def test_wrong_flags(run, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["export", str(run), "--format=stablehlo", *flags])


def test_ties_within_rounding_are_counted():
    wanted = np.array([[1.0, 1.0 - 1e-7, 0.0], [0.0, 2.0, 1.0]], np.float32)
    found = wanted + np.array([[0, 1e-6, 0], [0, 0, 0]], np.float32)
    result = check.compare_logits(found, wanted)
    assert result.passed
    assert result.figures["ties"] == 1
    assert "(1 within rounding of a tie)" in result.text
    assert not check.compare_logits(wanted + 0.1, wanted).passed
    assert not check.compare_logits(wanted * np.float32(np.nan), wanted).passed
    assert not check.compare_logits(wanted[:1], wanted).passed


@pytest.mark.slow
@pytest.mark.parametrize("config", ["baseline", "fast_cpu"])
def test_all_of_cifar10(tmp_path, config, real_cifar10):
    flags = [f"--config={config}", "--config.num_epochs=0.1", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.runtime.data_dir={real_cifar10}"]
    subprocess.run([sys.executable, "train.py", *flags], cwd=REPOSITORY, check=True)
    done = export(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("equal classes on 10,000 images", done.stdout)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("cnn", "bfloat16"), ("resnet18", "float32"), ("resnet18", "bfloat16")]
)
def test_every_model_and_dtype(tmp_path, own_home, name, dtype):
    config = short_config()
    if name == "resnet18":
        config.model = cnn.load_config(REPOSITORY / "configs" / "resnet18.py").model
        config.model.features, config.model.stage_sizes = 4, (1, 1)
    config.model.dtype = dtype
    cnn.train_and_evaluate(config, tmp_path / "run")
    done = export(tmp_path / "run")
    assert done.returncode == 0, (done.stdout, done.stderr)
