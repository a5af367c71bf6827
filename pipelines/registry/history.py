"""Who was champion, since when, by whom and why: `.ingot/registry/history.jsonl`, append-only, readable without MLflow.

MLflow's aliases have no history of their own. The alias in MLflow is the truth about now; this file is the truth
about before, and what `ingot plan` reads.
"""

from __future__ import annotations

import datetime as dt
import getpass
import json
import socket
from pathlib import Path
from typing import Any

from pipelines.core.redaction import redact_value
from pipelines.core.store import open_store

HISTORY = "registry/history.jsonl"
PROMOTE, ROLLBACK, OBSERVED, REGISTERED, REFUSED = "promote", "rollback", "observed", "registered", "refused"
_MOVES = (PROMOTE, ROLLBACK, OBSERVED)

NOTED = ("fingerprint", "digest", "base", "method", "bits", "family", "test_digest", "dvc_hash")
"""Tags of a version that a record keeps: what a plan must know of a champion is among them."""

Record = dict[str, Any]


def append(store_root: Path, model: str, action: str, *, version: str | None, why: str, **facts: Any) -> Record:
    """Add one record, durably and without secrets; one that a power cut left unfinished is closed off, never merged."""
    told = {"model": model, "action": action, "version": version, "why": why, **facts}
    record: Record = redact_value("", who_and_when() | told)
    open_store(store_root).append(HISTORY, json.dumps(record, sort_keys=True))
    return record


def who_and_when() -> dict[str, str]:
    """Return who acts, and when."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return {"time": now, "who": f"{_user()}@{socket.gethostname()}"}


def read(store_root: Path, model: str | None = None) -> list[Record]:
    """Return every record, oldest first; lines that are unfinished or damaged are left out."""
    lines = (open_store(store_root).read(HISTORY) or "").splitlines()
    records = [record for text in lines if (record := _parse(text)) is not None]
    return [record for record in records if model in {None, record["model"]}]


def champion(store_root: Path, model: str) -> Record | None:
    """Return the record that made the champion that this store last saw, or None when it saw none.

    The alias in MLflow may have been moved since; see `current`.
    """
    succession = champions(store_root, model)
    return succession[-1] if succession and succession[-1]["version"] is not None else None


def champions(store_root: Path, model: str) -> list[Record]:
    """Return the succession of champions, the present one last; a rollback removes those that it took back.

    A record without a version stands for a time without a champion.
    """
    succession: list[Record] = []
    for record in read(store_root, model):
        if record["action"] not in _MOVES:
            continue
        numbers = [earlier["version"] for earlier in succession]
        if record["action"] == ROLLBACK and record["version"] in numbers[:-1]:
            del succession[len(numbers) - numbers[-2::-1].index(record["version"]) - 1 :]
        elif record["action"] == OBSERVED and len(numbers) > 1 and record["version"] == numbers[-2]:
            succession.pop()
        elif not numbers or numbers[-1] != record["version"]:
            succession.append(record)
    return succession


def models(store_root: Path) -> list[str]:
    """Return the names of all registered models that this store knows of."""
    return sorted({record["model"] for record in read(store_root) if record["action"] != REFUSED})


def fingerprints(store_root: Path) -> set[str]:
    """Return the fingerprints of every model that was registered from this store: what `gc` must keep."""
    return {r["fingerprint"] for r in read(store_root) if r["action"] != REFUSED and r.get("fingerprint")}


def _parse(text: str) -> Record | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"model", "action", "version"} <= record.keys():
        return None
    texts = (record["model"], record["action"], record["version"] or "")
    return record if all(isinstance(text, str) for text in texts) else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
