"""Clocks that are wrong: what goes on after a kill is told by step and content, never by times of files."""

from __future__ import annotations

import datetime as dt
import itertools
import os
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults_full]
YEARS = itertools.cycle((1970, 2100))


def test_files_of_1970_and_2100_change_nothing(killed_at_7: Any, uninterrupted: Any) -> None:
    """Every file and folder of the store, the newest checkpoint and the records of its steps among them."""
    run = killed_at_7
    for path in sorted(run.store.root.rglob("*")):
        moment = dt.datetime(next(YEARS), 1, 2, tzinfo=dt.UTC).timestamp()
        os.utime(path, (moment, moment))
    finished = run.finish()
    assert finished.resumed_at == [5]
    assert finished.losses == uninterrupted.losses
    assert finished.files == uninterrupted.files
    assert finished.steps == uninterrupted.steps
