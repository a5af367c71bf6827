"""Progress is told by our own lines; the bars of libraries would only tear them apart."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def bars() -> Iterator[None]:
    """Show no tqdm bar inside the block, not even those that ask to be shown whatever TQDM_DISABLE says."""
    from tqdm.std import tqdm

    shown = tqdm.__init__

    def hidden(bar: tqdm, *arguments: Any, **options: Any) -> None:
        shown(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = shown


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show neither bars nor logged warnings inside the block, for a command whose output is an answer.

    Libraries log while they are imported, too: of extensions and accelerators that are not there.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with bars():
            yield
    finally:
        logging.disable(before)
