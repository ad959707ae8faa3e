import importlib

import pytest

from cnn.commands import COMMANDS


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(command, words):
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_with_an_example(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"    python -m cnn {name} " in out
    assert importlib.import_module(f"cnn.commands.{name.replace('-', '_')}").__doc__


def test_a_mistyped_command(command):
    code, out, err = command("evalute", "run")
    assert (code, out) == (2, "")
    assert err == "error: unknown command 'evalute'; did you mean evaluate?\n"
