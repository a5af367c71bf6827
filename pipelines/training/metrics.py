"""`metrics.jsonl`: one JSON object per logged step, the truth about a run that every other display is fed from.

Only rank 0 writes. After a kill the file is cut back to the step that training resumes at, so each step is there once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pipelines.core import artifact

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSON Lines file; a last line that a kill cut short is left out, a missing file is empty.

    Raises:
        ValueError: a line before the last one is damaged.
    """
    if not path.exists():
        return []
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in whole]
    del rest  # empty, or half a line
    return records


class MetricsLog:
    """The file, open for appending.

    Args:
        path: the file; created when missing.
        resume_at: records of this step and later are removed; steps count from 0 as done steps, so the record of the
            update that led to step n has `step` n.
    """

    def __init__(self, path: Path, *, resume_at: int) -> None:
        self._path = path
        self._stream = self._cut(resume_at)

    def _cut(self, step: int) -> TextIO:
        kept = [record for record in read_records(self._path) if record["step"] <= step]
        artifact.write_text(self._path, "".join(_line(record) for record in kept))
        return self._path.open("a", encoding="utf-8")

    def cut_back(self, step: int) -> None:
        """Remove the records of later steps."""
        self._stream.close()
        self._stream = self._cut(step)

    def sync(self) -> None:
        """Force what was written on to the disk; before a checkpoint claims those steps as done."""
        os.fsync(self._stream.fileno())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line, visible to readers at once."""
        self._stream.write(_line(record))
        self._stream.flush()

    def close(self) -> None:
        """Force the file on to the disk and close it."""
        self.sync()
        self._stream.close()


class Tail:
    """Follows a metrics file that another process writes, also when that process cuts it back and goes on.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._step = -1

    def new_records(self) -> list[Record]:
        """Return the complete records that appeared since the last call, each step once."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            status = self._path.stat()
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                self._file, self._offset = (status.st_dev, status.st_ino), 0
            stream.seek(self._offset)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        records = [json.loads(line) for line in complete.splitlines()]
        fresh = [record for record in records if record["step"] > self._step]
        self._step = max((record["step"] for record in fresh), default=self._step)
        return fresh


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
