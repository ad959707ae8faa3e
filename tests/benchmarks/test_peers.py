"""The comparison with other frameworks; those need not be installed here."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

import benchmarks.peers.__main__ as peers
from benchmarks.peers import lineup
from benchmarks.peers.contenders import flax_networks, ours, plain, problem, textbook
from benchmarks.peers.contenders.problem import make_problem
from benchmarks.peers.rotation import Series, WorkerProcess, check_agreement
from benchmarks.peers.tables import all_variants, best, comparison, matmul_share, ratio
from benchmarks.peers.worker import Worker
from cnn import UserError
from tests.benchmarks.helpers import run_benchmark


@pytest.fixture
def series():
    def make(contender, rates, group=None, unit="images/s"):
        row = "baseline", "train", 32, "float32"
        return Series(*row, contender, group or contender, unit, rates)

    return [
        make("ours", [300.0, 400.0, 500.0]),
        make("textbook", [100.0, 100.0, 100.0]),
        make("keras-graph", [150.0, 200.0, 100.0], "keras"),
        make("keras-xla", [90.0, 400.0, 90.0], "keras"),
        make("matmul-jax", [18.0, 19.0, 20.0], "matmul", "GFLOP/s"),
        make("matmul-numpy", [21.0, 22.7, 23.0], "matmul", "GFLOP/s"),
    ]


def test_quick_comparison_writes_table_samples_and_plot(tmp_path):
    flags = ("--quick", "--contenders=ours-loop,textbook,matmul-numpy", "--dtypes=float32,bfloat16")
    done = run_benchmark("peers", *flags, "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert "float32: the losses of 3 steps agree within" in done.stderr
    assert "bfloat16: the losses of 2 steps agree within" in done.stderr

    text = (tmp_path / "results" / "peers.md").read_text()
    assert done.stdout.strip() == text.strip()
    assert "| baseline | train | 16 | float32 |" in text
    assert "| baseline | train | 16 | bfloat16 |" in text

    record = json.loads((tmp_path / "results" / "peers.json").read_text())
    products = [one["dtype"] for one in record["series"] if one["group"] == "matmul"]
    assert products == ["float32"] * 2
    assert len(record["series"]) == 2 * (2 + 1) + 2, "the loop only trains"
    for one in record["series"]:
        assert len(one["rates"]) == 2
        assert min(one["rates"]) > 0
        assert one["peak_mib"] > 50
    assert record["machine"]["versions"]["jax"]
    assert str(tmp_path) not in text + json.dumps(record)
    assert (tmp_path / "results" / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_median_ratio_and_share(series):
    ours = best(series, "ours")
    assert best(series, "keras").contender == "keras-graph"  # by median, not by the luckiest round
    assert best(series, "pytorch") is None
    assert ratio(ours, best(series, "keras")) == (400 / 150, 300 / 150, 500 / 100)
    # 400 images/s of 22.7 MFLOP are 9.08 GFLOP/s; the faster product does 22.7.
    assert matmul_share(ours, best(series, "matmul")) == pytest.approx(0.4)


def test_tables_name_the_best_variant_and_list_all(series):
    row = comparison(series).splitlines()[2]
    assert "| 400 (300 to 500) | 23 (21 to 23) | 40% | 4.00 (3.00 to 5.00) |" in row
    assert "2.67 (2.00 to 5.00) graph | - |" in row
    assert len(all_variants(series).splitlines()) == 2 + len(series)


def test_rows_of_bfloat16_are_compared_with_each_other_and_with_our_float32(series):
    def in_bfloat16(one, factor):
        return dataclasses.replace(one, dtype="bfloat16", rates=[factor * r for r in one.rates])

    series += [in_bfloat16(series[0], 1.5), in_bfloat16(series[1], 3.0)]
    float32, bfloat16 = comparison(series).splitlines()[2:]
    assert "| 4.00 (3.00 to 5.00) | 2.67 (2.00 to 5.00) graph | - | - |" in float32
    assert "| bfloat16 | 600 (450 to 750) | - | - | 2.00 (1.50 to 2.50) |" in bfloat16
    assert bfloat16.endswith("| - | - | 1.50 (1.50 to 1.50) |")
    assert comparison(series[-2:]).splitlines()[2].endswith("| - | - | - |")


@pytest.mark.parametrize("what", ["losses", "logits"])
@pytest.mark.parametrize("wrong", [2.001, float("nan")])
def test_other_mathematics_is_refused(what, wrong):
    right = {"logits": [[0.0, 2.0]], "losses": [2.0, 1.5]}
    close = {"logits": [[1e-5, 2.0]], "losses": [2.00001, 1.5]}
    answers = {"textbook": right, "other": close}
    assert check_agreement(answers, "textbook") == pytest.approx(5e-6)
    answers["other"] = {**close, what: [[0.0, wrong]] if what == "logits" else [wrong, 1.5]}
    with pytest.raises(UserError, match=f"other computes something else .* first {what}"):
        check_agreement(answers, "textbook")


def test_a_wrong_program_is_refused_in_bfloat16_too(monkeypatch):
    def answer():
        right = make_problem("baseline", 16, "bfloat16")
        few = dataclasses.replace(right, images=right.images[:4], labels=right.labels[:4])
        return Worker(textbook.program(few)).check(steps=2)

    answers = {"textbook": answer()}
    # As another order of operations has it: too much for float32.
    answers["other"] = {
        what: (np.array(values) * (1 + 1e-3)).tolist()
        for what, values in answers["textbook"].items()
    }
    assert check_agreement(answers, "textbook", "bfloat16") == pytest.approx(1e-3)
    with pytest.raises(UserError, match="in float32: its first logits differ"):
        check_agreement(answers, "textbook", "float32")
    monkeypatch.setitem(problem.LEARNING_RATE, "baseline", 1.1e-3)
    answers["other"] = answer()
    with pytest.raises(UserError, match=r"other computes .* in bfloat16: its first losses differ"):
        check_agreement(answers, "textbook", "bfloat16")


def test_a_worker_that_dies_is_named():
    broken = lineup.Contender("ours", "", (), {"JAX_PLATFORMS": "abacus"})
    with (
        pytest.raises(UserError, match=r"contender ours in float32 failed: .*abacus"),
        WorkerProcess(broken, "baseline", 16, "float32"),
    ):
        pass


def test_shared_weights_fit_any_resnet18():
    """11,173,962 parameters, assigned by shape and order whatever the names of the layers."""
    weights = make_problem("resnet18", 1).weights
    assert sum(array.size for one in weights.values() for array in one.values()) == 11_173_962
    placed = ours.place(weights, flax_networks.ResNet18())
    assert placed.keys() == weights.keys()
    for layer, arrays in weights.items():
        for name, array in arrays.items():
            if layer.startswith("conv"):
                assert placed[layer][name] is array
            np.testing.assert_array_equal(placed[layer][name], array)
    with pytest.raises(UserError, match="other parameters than its peers"):
        ours.place(weights, flax_networks.Net94())


@pytest.mark.parametrize("network", plain.PLAIN)
def test_shared_weights_fit_the_networks_of_plain_layers(network):
    weights = make_problem(network, 1).weights
    model = flax_networks.textbook_model(network)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), "f"))
    shapes = jax.tree.map(lambda leaf: leaf.shape, dict(variables["params"]))
    assert shapes == jax.tree.map(np.shape, weights)


def test_arithmetic_of_the_vit_by_hand():
    tokens, width = 8 * 8, 128
    patches, head = 2 * tokens * 4 * 4 * 3 * width, 2 * width * 10
    dense = 2 * tokens * width * (3 * width + width + 2 * 4 * width)
    attention = 2 * 2 * tokens * tokens * width
    forward = patches + 4 * (dense + attention) + head
    assert plain.flop("vit") == {"infer": forward, "train": 3 * forward - patches}


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch, keras, .*pip install -e '\.\[bench\]'"):
        lineup.choose(["pytorch", "keras"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rounds=0"], "--rounds"),
        (["--seconds=soon"], "--seconds"),
        (["--batches=32,x"], "--batches"),
        (["--networks=resnet"], "unknown network 'resnet'; known: baseline, net94, resnet18, vgg"),
        (["--dtypes=float16"], "unknown dtype 'float16'; known: float32, bfloat16"),
        (["--contenders=mxnet"], "unknown contender 'mxnet'"),
        (["--contenders=matmul-numpy"], "none of these --contenders runs baseline in float32"),
        (["--networks=resnet18", "--contenders=matmul-numpy"], "none of .* runs resnet18"),
        (["--dtypes=bfloat16", "--contenders=matmul"], "runs baseline in bfloat16; add textbook"),
        (["--round=3"], "unrecognized arguments: --round=3"),
    ],
)
def test_bad_flags_are_input_errors(flags, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        peers.main(flags)
    assert "\n" not in str(caught.value)


def test_bad_flag_at_the_command_line():
    done = run_benchmark("peers", "--contenders=mxnet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown contender")
    assert done.stderr.count("\n") == 1
