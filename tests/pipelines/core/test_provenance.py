"""Provenance: the facts of the moment, from real git checkouts."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
from pathlib import Path

import pytest

from pipelines.core import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("x = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_named_by_its_commit(checkout: Path) -> None:
    assert provenance.git_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_changed_tracked_file_shows(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 2")
    assert provenance.git_commit(checkout) == git(checkout, "rev-parse", "HEAD") + "+dirty"


def test_an_untracked_file_does_not(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("hello")
    assert provenance.git_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_outside_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit(tmp_path) == "unknown"


def test_without_git_the_commit_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert provenance.git_commit(checkout) == "unknown"


def test_a_user_id_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under an arbitrary user id."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    assert provenance._user() == "unknown"


def test_capture_records_who_when_and_from_what() -> None:
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    record = provenance.capture(duration_s=1.23456, source_digest="ab", data_hash="cd.dir")
    assert before <= dt.datetime.fromisoformat(record.created_at) <= dt.datetime.now(dt.UTC)
    assert record.duration_s == 1.235
    assert (record.source_digest, record.data_hash) == ("ab", "cd.dir")
    assert record.host
    assert record.python
    assert record == provenance.Provenance.model_validate_json(record.model_dump_json())
