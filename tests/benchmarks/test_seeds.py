"""Several seeds in one program beside as many processes."""

import json

import pytest

from tests.benchmarks.helpers import run_benchmark
from tests.helpers import REPOSITORY


@pytest.mark.slow
def test_each_layout_is_timed_beside_processes(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.helpers import short_config as get_config\n"
    )
    flags = ("--config", config, "--num-seeds=2", "--rounds=1", "--layouts=in_turn")
    done = run_benchmark("seeds", *flags, "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert set(record["rounds"][0]) == {"processes", "in_turn"}
    assert "| in_turn |" in done.stdout
    refused = run_benchmark("seeds", "--layouts=none")
    assert refused.returncode == 2
    assert "unknown layout none; known: per_device, in_turn, vmap" in refused.stderr
