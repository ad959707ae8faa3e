"""The benchmark of GPUs and TPUs, in its smallest form, on a CPU."""

import json

import pytest

import benchmarks.accelerator.__main__ as accelerator
from benchmarks.accelerator.peaks import Peak, peak
from benchmarks.accelerator.tables import Precision, Sitting, markdown
from benchmarks.accelerator.timed import Part, Timed
from benchmarks.flops import RunFlop
from cnn import UserError


def test_quick_form_writes_runs_parts_and_lengths(tmp_path, capsys):
    flags = ["--quick", "--seeds=1", "--dtypes=float32", "--out", str(tmp_path)]
    accelerator.main([*flags, "--config.runtime.num_devices=1"])
    text = (tmp_path / "speed94_cpu.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "accuracy was not measured" in text
    record = json.loads((tmp_path / "speed94_cpu.json").read_text())
    (one,) = record["precisions"]
    assert one["again"]["digest"] == one["warm"][0]["digest"] != one["cold"]["digest"]
    assert one["cold"]["seconds"] > one["warm"][0]["seconds"] > 0
    assert {part["name"]: part["count"] for part in one["parts"]}["training step"] == 6
    assert all(part["seconds"] > 0 for part in one["parts"])
    assert list(one["lengths"]) == ["1", "5", "3"]
    assert str(tmp_path) not in text + json.dumps(record)


def test_a_cpu_is_refused_without_quick():
    with pytest.raises(UserError, match="no GPU or TPU here; add --quick"):
        accelerator.main([])


def test_unknown_precision_is_an_input_error():
    with pytest.raises(UserError, match="unknown precision 'float8'"):
        accelerator.main(["--dtypes=float8"])


def test_shares_of_the_peak_and_what_the_host_costs():
    assert peak("NVIDIA H100 PCIe").tflops < peak("NVIDIA H100 80GB HBM3").tflops
    assert peak("NVIDIA GeForce") is None
    one = Precision("bfloat16", 25, RunFlop(9e12, 1e12), 1000)
    one.warm = [Timed(seed, 2.0, 0.94, "digest") for seed in (1, 2, 3)]
    one.again = Timed(1, 2.0, 0.94, "other")
    one.parts = [
        Part("step", 0.01, 100, 9e10),
        Part("... forward", 0.002, 100, is_detail=True),
        Part("evaluation", 0.4, 1, 1e12),
    ]
    sitting = Sitting("TPU v9", 2, Peak(10.0, "a book"), "photos", True, [one])
    text = markdown(sitting, "command", "machine")
    assert "bfloat16 peak 20 TFLOP/s (a book)" in text
    assert "| 2.000 (2.000 to 2.000) | 94.00 ± 0.00 % | 500 | 5 (25.0%) | no |" in text
    assert "| step | 10.000 | 100 | 1.000 | 50.0% | 9 (45.0%) |" in text
    assert "| the rest: waiting for the host |  |  | 0.600 | 30.0% | - |" in text
