"""The log of a command: what libraries say and what went wrong, in a file that exists once there is something in it.

The terminal is for our own lines: warnings of libraries would stand between them, and few of them are for the user.
`--verbose` shows everything in both places.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TextIO

from pipelines.core.errors import ConfigError

FOLDER = "logs"
_OURS = ("flows", "pipelines", "models")
_KEPT = 20
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Formatter(logging.Formatter):
    """Takes secrets out of every line, also of a traceback that a library has put a password into."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        from pipelines.core.redaction import redact

        return redact(super().format(record))


class _LogFile(logging.FileHandler):
    """A log whose folder is found and made with its first line; where it cannot be made, nothing is written."""

    def __init__(self) -> None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        super().__init__(name, delay=True, encoding="utf-8")
        self.folder: Path | None = None
        self._name_of_file = name
        self.setFormatter(_Formatter(_FORMAT))

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        self.folder = self.folder or _folder()
        return self.folder / self._name_of_file

    def _open(self) -> io.TextIOWrapper:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in sorted(self.path.parent.glob("*.log"))[: -_KEPT + 1]:
                old.unlink(missing_ok=True)
            return self.path.open("a", encoding="utf-8")
        except OSError:
            return Path(os.devnull).open("w", encoding="utf-8")


def _folder() -> Path:
    """Return the folder for logs: in the store, where there is one; else that for temporary files."""
    from pipelines.core import project  # with pydantic, which `ingot -h` does without

    said = os.environ.get("INGOT_STORE", ".ingot")
    store = Path(".ingot" if said.startswith("s3://") else said)
    if store.is_absolute():
        return store / FOLDER
    try:
        here = project.find_any()
    except ConfigError:
        here = None
    return Path(tempfile.gettempdir()) / "ingot-logs" if here is None else here / store / FOLDER


class _Terminal(logging.StreamHandler[TextIO]):
    """Warnings of Ingot itself, or everything when it is verbose."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter("ingot: %(message)s"))
        self.addFilter(lambda record: self.verbose or record.name.partition(".")[0] in _OURS)
        self.verbose = False


_file: _LogFile | None = None
_terminal: _Terminal | None = None


def start() -> None:
    """Take the logs of this process; the first call counts."""
    global _file, _terminal
    if _file is not None:
        return
    _file, _terminal = _LogFile(), _Terminal()
    _file.setLevel(logging.WARNING)
    _terminal.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    take_back()


def take_back() -> None:
    """Be the root logger's only listeners again, after the import of a library that sets up logging by itself."""
    if _file is not None and _terminal is not None:
        logging.getLogger().handlers[:] = [_file, _terminal]


def into(store_root: Path) -> None:
    """Write the log into this store, if nothing was written so far."""
    if _file is not None and _file.stream is None:
        _file.folder = store_root.resolve() / FOLDER


def be_verbose() -> None:
    """Show what libraries say and our own debug lines from now on, and say where they are written."""
    start()
    assert _file is not None
    assert _terminal is not None
    _terminal.verbose = True
    for handler in (_file, _terminal):
        handler.setLevel(logging.DEBUG)
    _terminal.setFormatter(_Formatter(_FORMAT))
    logging.getLogger().setLevel(logging.INFO)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger(__name__).info("log: %s", _file.path)


def is_verbose() -> bool:
    """Whether `be_verbose` was called."""
    return _terminal is not None and _terminal.verbose


def foreseen(error: BaseException) -> None:
    """Keep the traceback of a library's error that reaches the user as one of ours; `--verbose` shows it."""
    text = _traceback(error)
    if is_verbose():
        print(text, file=sys.stderr)
    elif _file is not None:
        _file.emit(_record_of(text))


def unexpected(error: BaseException) -> str:
    """Write an error that nobody foresaw to the log; return what to tell the user."""
    from pipelines.core.redaction import redact

    head = redact(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}")
    text = _traceback(error)
    if _file is None or is_verbose():
        return f"{text.rstrip()}\n\ningot: {head}"
    _file.emit(_record_of(text))
    if not _file.path.is_file():  # the disk is full, or not ours to write to
        return f"{text.rstrip()}\n\ningot: {head}"
    return (
        f"ingot: {head}\n  -> nobody foresaw this error: please open an issue with {_file.path} "
        "and the output of `ingot --version`; the same command with -v shows the traceback"
    )


def _traceback(error: BaseException) -> str:
    """Return a traceback without secrets."""
    from pipelines.core.redaction import redact

    return redact("".join(traceback.format_exception(error)))


def _record_of(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "name": "ingot", "msg": text})
