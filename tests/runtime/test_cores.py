"""A function on many items in threads: order, errors, and the end of the process."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from cnn.runtime import cores
from tests.helpers import REPOSITORY


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)


def test_order_and_threads():
    threads = set()

    def slowest_first(item):
        threads.add(threading.get_ident())
        time.sleep(0.01 / (1 + item))
        return item

    parts = list(cores.map_in_parts(slowest_first, iter(range(100))))
    assert [item for part in parts for item in part] == list(range(100))
    assert [len(part) for part in parts] == [48, 48, 4]
    assert threading.get_ident() not in threads
    assert list(cores.map_in_parts(abs, [])) == []


def test_an_error_is_raised_and_the_rest_not_begun():
    begun = []

    def fail(item):
        begun.append(item)
        raise LookupError(item)

    with pytest.raises(LookupError):
        list(cores.map_in_parts(fail, range(1000)))
    assert len(begun) <= 3


SCRIPT = """
import time
from cnn.runtime import cli, cores, signals

def main(words):
    signals.raise_on_signals()
    def hang(item):
        print("begun", flush=True)
        time.sleep(60)
    list(cores.map_in_parts(hang, range(9)))

cli.run(main)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_while_a_call_hangs(signum, code):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signum)
            assert process.wait(timeout=10) == code
        finally:
            process.kill()
