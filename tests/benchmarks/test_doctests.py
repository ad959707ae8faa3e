"""The examples in docstrings of the benchmarks."""

import doctest

import pytest

from benchmarks import command_line, flops, report
from benchmarks.reliability import cost


@pytest.mark.parametrize("module", [command_line, flops, report, cost])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
