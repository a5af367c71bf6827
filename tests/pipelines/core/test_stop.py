"""Requests to stop, by real signals to real processes: none is lost, whatever swallows exceptions on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
HEAD = """
import os, signal, sys, time
from pipelines.core import stop
from pipelines.core.errors import Preempted
stop.install()
def say(text): print(text, flush=True)
def run(work):
    try:
        with stop.unwinding():
            work()
    except Preempted as error:
        say(error.message)
        sys.exit(error.exit_code)
"""
FOREVER = "while True: time.sleep(0.01)"


class Program:
    """A small program that says where it is on standard output."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"it ended before it said {word!r}: {self.process.communicate()}")

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@contextmanager
def program(code: str, *command: str) -> Iterator[Program]:
    process = subprocess.Popen(
        [*command, sys.executable, "-c", HEAD + textwrap.dedent(code)],
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    try:
        yield Program(process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_with_nothing_started_a_process_ends_at_once(signum: signal.Signals) -> None:
    with program(f"say('ready')\n{FOREVER}") as started:
        started.wait_for("ready")
        started.signal(signum)
        code, _, err = started.end()
    assert code == 75
    assert err == f"ingot: stopped by {signum.name}; run the same command again\n"


def test_it_ends_at_once_also_while_the_main_thread_is_deep_in_a_library() -> None:
    """The main thread sees no signal before `pbkdf2_hmac` returns, which takes minutes."""
    with program("import hashlib\nsay('ready')\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)") as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        assert started.end()[0] == 75


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    with program(f"say('ready')\n{FOREVER}", "nohup") as started:
        started.wait_for("ready")
        started.signal(signal.SIGHUP)
        started.signal(signal.SIGTERM)
        code, _, err = started.end()
    assert code == 75
    assert "stopped by SIGTERM" in err


def test_a_request_that_something_swallows_is_made_again() -> None:
    code = """
    def work():
        try:
            say('ready')
            while True: time.sleep(0.01)
        except BaseException:
            say('swallowed')
        while True: time.sleep(0.01)
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        code_, out, _ = started.end()
    assert (code_, out.splitlines()) == (75, ["swallowed", "stopped by SIGTERM"])


def test_a_request_in_a_destructor_is_made_again() -> None:
    code = """
    class Deaf:
        def __del__(self):
            say('ready')
            end = time.monotonic() + 2
            while not stop.requested() and time.monotonic() < end: pass
    def work():
        Deaf()
        while True: time.sleep(0.01)
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        assert started.end()[:2] == (75, "stopped by SIGTERM\n")


def test_what_cleans_up_is_not_interrupted_again() -> None:
    code = """
    def work():
        try:
            say('ready')
            while True: time.sleep(0.01)
        finally:
            time.sleep(1.2)
            say('clean')
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        assert started.end()[:2] == (75, "clean\nstopped by SIGTERM\n")


def test_a_held_block_is_finished_first() -> None:
    code = """
    def work():
        with stop.held():
            say('ready')
            while not stop.requested(): time.sleep(0.01)
            say('finished')
        time.sleep(60)
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        assert started.end()[:2] == (75, "finished\nstopped by SIGTERM\n")


def test_a_receiver_gets_the_request_once_and_the_block_goes_on() -> None:
    code = """
    got = []
    def work():
        with stop.passed_to(got.append):
            say('ready')
            while not got: time.sleep(0.01)
            say(f'got {got}')
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGINT)
        started.signal(signal.SIGINT)  # `timeout` and a shell signal twice
        assert started.end()[:2] == (75, "got [2]\nstopped by SIGINT\n")


def test_a_second_signal_ends_it_at_once_after_its_last_words() -> None:
    code = """
    def work():
        with stop.held(), stop.last_words(lambda: say('last words')):
            say('ready')
            while not stop.requested(): time.sleep(0.01)
            time.sleep(0.6)
            say('again')
            time.sleep(60)
    run(work)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        started.wait_for("again")
        started.signal(signal.SIGTERM)
        code_, out, err = started.end()
    assert (code_, out) == (75, "last words\n")
    assert err.splitlines()[1:] == ["ingot: ended by a second SIGTERM; run the same command again"]


def test_a_request_that_is_read_late_does_not_end_who_is_on_the_way_out() -> None:
    """A scope got the request and ended before the thread that watches was given a processor."""
    code = """
    read = os.read
    def late(*arguments):
        got = read(*arguments)
        time.sleep(0.5)
        return got
    os.read = late
    signal.raise_signal(signal.SIGALRM)  # the thread reads again, late from now on
    try:
        with stop.unwinding():
            say('ready')
            while True: time.sleep(0.01)
    except Preempted as error:
        time.sleep(1)
        say('the record is closed')
        sys.exit(error.exit_code)
    """
    with program(code) as started:
        started.wait_for("ready")
        started.signal(signal.SIGTERM)
        code_, out, err = started.end()
    assert (code_, out) == (75, "the record is closed\n")
    assert err == "ingot: SIGTERM: stopping; a second one ends it at once\n"


def test_signals_of_a_forked_child_are_its_own() -> None:
    code = """
    child = os.fork()
    if child == 0:
        while True: time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    say(os.waitpid(child, 0)[1])
    say(stop.requested())
    """
    with program(code) as started:
        assert started.end()[:2] == (0, f"{int(signal.SIGTERM)}\nNone\n")


def test_a_process_that_only_looks_ends_as_shells_expect() -> None:
    with program(f"stop.only_looking()\nsay('ready')\n{FOREVER}") as started:
        started.wait_for("ready")
        started.signal(signal.SIGINT)
        assert started.end() == (130, "", "")
