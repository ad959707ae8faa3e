"""The first seconds of a run, timed in processes of their own."""

import json

from benchmarks.startup.worker import PARTS
from tests.benchmarks.helpers import run_benchmark


def test_a_start_without_and_one_with_compiled_programs(tmp_path):
    done = run_benchmark("startup", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| digits | no | 1 |" in done.stdout
    record = json.loads((tmp_path / "startup.json").read_text())
    cold, warm = record["starts"]
    assert tuple(cold["parts"]) == tuple(warm["parts"]) == PARTS
    assert (cold["compiled"], warm["compiled"]) == (False, True)
    assert warm["cpu"] < cold["cpu"]  # which compiled
    # Before JAX is imported, which takes most of the first part.
    assert 0 < cold["first_line"] < sum(cold["parts"].values())
    assert str(tmp_path) not in (tmp_path / "startup.json").read_text()
