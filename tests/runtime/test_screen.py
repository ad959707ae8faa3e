"""Terminals, files and pipes."""

import os
import re
import sys
import time

import pytest

from cnn.runtime import screen


def test_the_live_line_follows_the_width_and_stays_below(terminal):
    screen.live("a" * 99)
    assert terminal.read() == "\r\x1b[J" + "a" * 49 + "\r"
    screen.log("above")
    assert terminal.read() == "\r\x1b[J\rabove\n\r\x1b[J" + "a" * 49 + "\r"
    terminal.resize(40)
    screen.live("b" * 99)
    assert terminal.read() == "\r\x1b[J" + "b" * 39 + "\r"
    terminal.resize(200)
    screen.live("c" * 99)
    assert terminal.read() == "\r\x1b[J" + "c" * 79 + "\r"
    screen.live("")
    screen.live("")
    assert terminal.read() == "\r\x1b[J\r"


def test_long_lines_are_folded_at_blanks(terminal):
    screen.log("  " + "word " * 12 + "x" * 60)
    lines = terminal.read().splitlines()
    assert [len(line) for line in lines] == [46, 18, 64]
    assert lines[1].startswith("    word")


def test_colours_only_where_they_are_wanted(terminal, monkeypatch):
    assert screen.styled("x", "green") == "\x1b[32mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert screen.styled("x", "green") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert screen.styled("x", "green") == "x"
    screen.live("x")
    assert terminal.read() == ""


def test_a_stream_that_is_closed_or_full_fails_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        screen.log("x")
        monkeypatch.setattr(sys, "stdout", None)
        screen.log("x")
        screen.live("x")
        with pytest.raises(OSError, match="No space left"):
            full.flush()  # it was tried
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_what_is_fast_is_not_mentioned(capsys):
    with screen.waiting("compiling"):
        pass
    assert capsys.readouterr() == ("", "")


def test_what_takes_a_while_says_so_in_a_file(capsys, monkeypatch):
    monkeypatch.setattr(screen, "_PATIENCE", 0.02)
    with screen.waiting("loading"):
        time.sleep(0.1)
        with screen.waiting("decoding", sys.stderr) as task:
            task.detail = "1 of 2 images"
            time.sleep(0.1)
    out, err = capsys.readouterr()
    assert err == ""  # a task within another one is reported where that one is
    assert re.sub(r"[\d.]+ s", "S", out).splitlines() == [
        "loading ...",
        "decoding ... 1 of 2 images",
        "decoding: S",
        "loading: S",
    ]


def test_a_program_reports_all_tasks_on_one_stream(capsys, monkeypatch):
    monkeypatch.setattr(screen, "_PATIENCE", 0.0)
    with screen.tasks_reported_on(sys.stderr), screen.waiting("loading", sys.stdout):
        time.sleep(0.02)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "loading ...")
    with screen.waiting("loading"):
        time.sleep(0.02)
    assert capsys.readouterr().out


def test_what_takes_a_while_is_counted_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr(screen, "_PATIENCE", 0.02)
    with screen.waiting("compiling"):
        time.sleep(0.1)
        assert terminal.read() == "\r\x1b[Jcompiling ...  0 s\r"
    assert re.fullmatch(r"\r\x1b\[J\rcompiling: 0\.\d s\n", terminal.read())


def test_what_fails_is_not_said_to_be_done(capsys, monkeypatch):
    monkeypatch.setattr(screen, "_PATIENCE", 0.0)

    def divide():
        with screen.waiting("dividing"):
            time.sleep(0.05)
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        divide()
    assert capsys.readouterr().out == "dividing ...\n"
