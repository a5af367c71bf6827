"""What stands in MLflow's SQLite database of registered models, read without MLflow, whose import takes seconds.

For commands that only look. A database whose schema is not one of `SCHEMAS`, or that does not answer, is left to
MLflow, which then also says what is wrong with it; so is one with workspaces.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

SCHEMAS = frozenset({"dc11669786a5"})
"""Revisions of MLflow's schema (alembic) that the queries below were compared with MLflow's own answers on."""
_REVISION = "SELECT version_num FROM alembic_version"
_WORKSPACES = "SELECT 1 FROM registered_models WHERE workspace != 'default' LIMIT 1"
# A prompt is a registered model too, which MLflow's searches leave out; so do they a version that was deleted.
_PROMPTS = """
SELECT name FROM registered_model_tags WHERE key = 'mlflow.prompt.is_prompt' AND value = 'true'
UNION SELECT name FROM model_version_tags WHERE key = 'mlflow.prompt.is_prompt' AND value = 'true'
"""
_VERSIONS = f"""
SELECT name, version, source FROM model_versions
WHERE coalesce(current_stage, '') != 'Deleted_Internal' AND name NOT IN ({_PROMPTS})
"""  # noqa: S608 - a constant of ours
_ALIASES = "SELECT name, version, alias FROM registered_model_aliases"
_TAGS = "SELECT name, version, key, value FROM model_version_tags"


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    source: str
    """URI of its files."""
    aliases: tuple[str, ...]
    tags: dict[str, str]


def versions(path: Path) -> list[Version] | None:
    """Return every version of every registered model; None when MLflow itself has to be asked.

    Args:
        path: the database.
    """
    if os.environ.get("MLFLOW_ENABLE_WORKSPACES") or os.environ.get("MLFLOW_WORKSPACE"):
        return None
    with contextlib.suppress(sqlite3.Error):  # MLflow finds the same, and says it with advice
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10.0, isolation_level=None)) as database:
            database.execute("BEGIN")  # one moment for all queries
            return _read(database)
    return None


def _read(database: sqlite3.Connection) -> list[Version] | None:
    revisions = {revision for (revision,) in database.execute(_REVISION)}
    if not revisions or revisions - SCHEMAS or database.execute(_WORKSPACES).fetchone():
        return None
    aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
    tags: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for name, number, alias in database.execute(_ALIASES):
        aliases[name, number].append(alias)
    for name, number, key, value in database.execute(_TAGS):
        tags[name, number][key] = value
    return [
        Version(name, str(number), str(source), tuple(sorted(aliases[name, number])), tags[name, number])
        for name, number, source in database.execute(_VERSIONS)
    ]
