"""Stop requests: what SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed) do, from a process's first line on.

An exception raised by a signal handler is easily lost: an import, a destructor or a library's `except` takes it for
something else. So the request is kept, and a thread of its own sees to it:

* outside of any scope below, nothing has been started that needs an end: the process ends at once;
* inside `unwinding`, the main thread gets `StopRequested`, again and again until the stack unwinds;
* inside `passed_to` and `held`, nobody is interrupted; what was asked meanwhile is raised at the end of the block;
* a second signal ends the process at once, after `last_words`. Children die with it (see `parent_guard.py`).

The exit code is always that of `Preempted`. A signal that was ignored when the process began (nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from pipelines.core.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_S = 0.5
"""Signals within this time are one request: `timeout` signals a process and its group, a shell repeats a hang-up."""
_AGAIN_S = 0.5
"""How soon `StopRequested` is raised again when something swallowed it."""


class StopRequested(KeyboardInterrupt):
    """A signal asked this process to stop; a KeyboardInterrupt, because libraries know to let that one pass."""


@dataclass
class _State:
    """What is known of the requests to this process."""

    installed: bool = False
    announces: bool = True
    scopes: list[Callable[[int], object]] = field(default_factory=list)
    """What the main thread does with a request, innermost scope last."""
    last_words: list[Callable[[], None]] = field(default_factory=list)
    only_looks: bool = False
    """Whether this process does no work of its own."""
    signum: int | None = None
    """The first signal that came."""
    taken: bool = False
    """Whether a scope was told of it: from then on the main thread is on its way to an orderly end."""
    masks: dict[int, set[Any]] = field(default_factory=dict)
    """Signal masks of threads that are forking."""


_state = _State()
_lock = threading.Lock()


def install(*, announces: bool = True) -> None:
    """Take over the signals; the first thing that a process does, before it imports anything big.

    Args:
        announces: whether a request is answered on standard error.
    """
    if _state.installed or threading.current_thread() is not threading.main_thread():
        return
    _state.installed, _state.announces = True, announces
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="ingot-stop", daemon=True).start()
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)
    signal.signal(signal.SIGALRM, _again)
    _handle()


def only_looking() -> None:
    """Say that this process only looks at the work of another: stopped, it ends as shells expect, not as preempted."""
    _state.only_looks = True


def requested() -> int | None:
    """Return the signal that asked this process to stop, None while none has."""
    return _state.signum


def check() -> None:
    """Raise `StopRequested` if a stop was asked for."""
    if _state.signum is not None:
        _interrupt(_state.signum)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Raise `StopRequested` in the main thread when a stop is asked for inside the block.

    Does nothing in a process that did not `install`.

    Raises:
        Preempted: the block was stopped.
    """
    try:
        with _scope(_interrupt):
            check()
            yield
            check()
    except StopRequested as error:
        raise Preempted(str(error), hint="the same command goes on where it stopped") from error


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Interrupt nothing inside the block; a request is kept for later."""
    with _scope(lambda _signum: None):
        yield


@contextlib.contextmanager
def passed_to(receiver: Callable[[int], object]) -> Iterator[None]:
    """Hand a request inside the block to `receiver`, which must end the work that the block waits for.

    In the main thread of a process that did not `install`, the signals are taken over for the length of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _state.installed:
        with _scope(receiver):
            yield
    else:
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(signum, lambda number, _frame: receiver(number) and None)
        try:
            yield
        finally:
            _restore(before)


@contextlib.contextmanager
def last_words(call: Callable[[], None]) -> Iterator[None]:
    """Have `call` made when a second signal ends the process inside the block; it may run in any thread."""
    _state.last_words.append(call)
    try:
        yield
    finally:
        _state.last_words.remove(call)


@contextlib.contextmanager
def _scope(action: Callable[[int], object]) -> Iterator[None]:
    if not _state.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    depth = len(_state.scopes)
    try:
        with _lock:
            _state.scopes.append(action)
        _handle()  # a library may have put its own handler in the place of ours
        yield
    finally:
        _restore(before)
        with _lock:
            del _state.scopes[depth:]
        if depth == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _handle() -> None:
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _receive)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for signum, handler in handlers.items():
        if handler is not None:  # None: it was not set from Python
            signal.signal(signum, handler)


def _receive(signum: int, _frame: FrameType | None) -> None:
    """Note a request, in the main thread, and do what the innermost scope says."""
    first = _note(signum)
    if first and _state.scopes:
        _state.taken = True
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        _state.scopes[-1](signum)


def _note(signum: int) -> bool:
    """Keep a request; return whether it is the first."""
    if _state.signum is not None:
        return False
    _state.signum = signum
    return True


def _interrupt(signum: int) -> None:
    raise StopRequested(f"stopped by {signal.Signals(signum).name}")


def _again(_signum: int, _frame: FrameType | None) -> None:
    """Interrupt the main thread once more, unless it is on its way out."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, StopRequested | Preempted):
            return
        error = error.__cause__ or error.__context__
    if _state.signum is not None and _state.scopes and _state.scopes[-1] is _interrupt:
        _interrupt(_state.signum)


def _watch(reader: int) -> None:
    """Answer each request, also while the main thread is deep in a library."""
    answered = False
    while True:
        signum = os.read(reader, 1)[0]
        if signum not in SIGNALS:
            continue
        name = signal.Signals(signum).name
        with _lock:
            if _state.only_looks:
                os._exit(128 + signum)
            if not _state.scopes and not _state.taken:  # taken: read late, the scope has ended in the meantime
                _say(f"stopped by {name}; run the same command again")
                _end()
        if not answered:
            answered, first_at = True, time.monotonic()
            _say(f"{name}: stopping; a second one ends it at once")
        elif signum != signal.SIGHUP and time.monotonic() - first_at > _SAME_REQUEST_S:
            for call in reversed(_state.last_words):
                with contextlib.suppress(Exception):  # nothing may keep it from ending
                    call()
            _say(f"ended by a second {name}; run the same command again")
            _end()


def _say(text: str) -> None:
    if _state.announces:
        with contextlib.suppress(OSError):
            os.write(2, f"ingot: {text}\n".encode())


def _end() -> None:
    os._exit(Preempted.exit_code)


def _block() -> None:
    """Let no signal reach a forked child while it still has our handlers: it would count as one to this process."""
    _state.masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _state.masks.pop(threading.get_ident()))


def _forget() -> None:
    """Leave a forked child to its own parent: it has the usual handlers, and its signals are not ours."""
    _state.installed = False
    signal.set_wakeup_fd(-1)
    for signum in (*SIGNALS, signal.SIGALRM):
        if signal.getsignal(signum) in {_receive, _again}:
            signal.signal(signum, signal.SIG_DFL)
    _unblock()
