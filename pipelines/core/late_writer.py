"""Small texts that are written soon, in the background: what reports progress must not wait for a network."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pipelines.core.errors import IngotError

log = logging.getLogger(__name__)


class LateWriter:
    """Writes the newest text of every name, one after the other; older ones that were not written yet are left out.

    Args:
        write: writes a text by its name.
    """

    def __init__(self, write: Callable[[str, str], object]) -> None:
        self._write = write
        self._waiting: dict[str, str] = {}
        self._changed = threading.Condition()
        self._writing: str | None = None
        self._thread: threading.Thread | None = None

    def write(self, name: str, text: str) -> None:
        """Have a text written, and return at once."""
        with self._changed:
            self._waiting[name] = text
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="late writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self, name: str) -> None:
        """Leave out what waits under a name, and return when nothing is being written under it."""
        with self._changed:
            self._waiting.pop(name, None)
            while self._writing == name:
                self._changed.wait()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                name = next(iter(self._waiting))
                text, self._writing = self._waiting.pop(name), name
            try:
                self._write(name, text)
            except IngotError as error:
                log.warning("%s", error.message)
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()
