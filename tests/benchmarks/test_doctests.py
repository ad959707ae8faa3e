"""The examples in docstrings of the benchmarks."""

import doctest

import pytest

from benchmarks import command_line, flops, report
from benchmarks.accelerator import peaks
from benchmarks.reliability import cost
from benchmarks.speedrun import original, runs, steps


@pytest.mark.parametrize(
    "module", [command_line, cost, flops, original, peaks, report, runs, steps]
)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
