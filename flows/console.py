"""What a run prints: progress on standard error, tables and results on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipelines.core.stage import Progress

_LINE_EVERY_S = 10.0
_last: dict[str, tuple[float, int]] = {}
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Print no progress from now on."""
    global _quiet  # noqa: PLW0603 - one process, one terminal
    _quiet = quiet


def progress_line(progress: Progress) -> None:
    """Show progress: a line that rewrites itself on a terminal, else a plain line every ten seconds."""
    if _quiet:
        return
    now = time.monotonic()
    finished = progress.done >= progress.total
    printed_at, _ = _last.get(progress.node, (0.0, -1))
    text = f"{progress.node:<22} {progress.done:>6}/{progress.total} {progress.unit}  {progress.message}"
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


def duration(seconds: float | None) -> str:
    """Return seconds as a person would say them, `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float | None) -> str:
    """Return a number of bytes with a decimal unit, `-` for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or "-"
    return str(value)
