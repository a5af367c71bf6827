"""Provenance: the facts of the moment."""

from __future__ import annotations

import datetime as dt
import os

import pytest

from pipelines.core import provenance


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
