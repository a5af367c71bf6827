"""The whole command on a disk that is too small: what it says, its exit code, and the same command with more room."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.core.store import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_on_a_full_disk_says_so_and_the_same_command_completes_with_more_room(
    disk_of: Callable[[int], Any], run_in: Callable[..., Any]
) -> None:
    """6 MiB are refused before work begins; 10 MiB may do, and do not. Everything of the run lies on this disk."""
    disk = disk_of(6 * 1024)
    command = ("run", "--recipe", "smoke", "--only", "prepare")
    refused = run_in(disk.path / "store", *command, check=4)
    assert "ingot: prepare needs up to" in refused.stderr
    assert "-> free some space (`ingot gc --dry-run`" in refused.stderr
    disk.resize(10 * 1024)
    full = run_in(disk.path / "store", *command, check=4)
    assert "ingot: no space for the artifact of prepare in" in full.stderr
    assert "bytes were written before the disk was full" in full.stderr
    assert "-> free some space (`ingot gc --dry-run`" in full.stderr
    assert "Traceback" not in full.stderr
    store = LocalStore(disk.path / "store")
    assert list(store.artifacts()) == []
    assert not list(store.root.glob("artifacts/*/.building-*"))
    (run,) = json.loads(run_in(store.root, "list", "runs", "--json").stdout)
    assert run["status"] == "failed"
    disk.resize(64 * 1024)
    run_in(store.root, *command)
    (made,) = store.artifacts()
    made.verify()
