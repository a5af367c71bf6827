"""What a run prints: progress on standard error, tables and results on standard output."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.core.stage import Progress

_LINE_EVERY_S = 10.0
_last: dict[str, tuple[float, int]] = {}
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Print no progress from now on."""
    global _quiet  # noqa: PLW0603 - one process, one terminal
    _quiet = quiet


def is_quiet() -> bool:
    """Whether only results are printed."""
    return _quiet


class _Terminal(io.FileIO):
    """A terminal that may be closed while the process goes on (`disown`): then what is written to it is gone."""

    def write(self, data: Any) -> int:
        """Write; a closed terminal takes everything."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def survive_closed_terminal() -> None:
    """Let whatever this process prints be lost, and nothing else, when its terminal is closed."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = io.BufferedWriter(_Terminal(descriptor, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def progress_line(progress: Progress) -> None:
    """Show progress: a line that rewrites itself on a terminal, else a plain line every ten seconds."""
    if _quiet:
        return
    now = time.monotonic()
    finished = progress.done >= progress.total
    printed_at, _ = _last.get(progress.node, (0.0, -1))
    count = f"{progress.done:>6}/{progress.total} {progress.unit}  " if progress.total else ""
    text = f"{progress.node:<22} {count}{progress.message}"
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="\n" if finished else "", file=sys.stderr, flush=True)
    elif finished or now - printed_at >= _LINE_EVERY_S:
        print(text, file=sys.stderr, flush=True)
        _last[progress.node] = (now, progress.done)


def say(text: str) -> None:
    """Print one line of news on standard error."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    """Print rows on standard output, as a table or as JSON (then with every key, not only the columns)."""
    if as_json:
        print(json.dumps(list(rows), indent=1, default=str))
        return
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in cells)]) for i, c in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or "-"
    return str(value)
