"""Registered models as rows for `ingot list models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.registry import mlflow_database
from pipelines.registry.current import CHAMPION
from pipelines.registry.mlflow_database import Version
from pipelines.registry.package import MODEL_FOLDER
from pipelines.tracking.client import connect, reachable
from pipelines.tracking.config import TrackingConfig, resolve_uri

_MANAGED_BY = "fingerprint"
"""A version without this tag was registered by somebody else."""


def rows(config: TrackingConfig, store_root: Path) -> list[dict[str, Any]]:
    """Return one row per version of the models that Ingot registers or that have a champion, newest first.

    Versions that others registered are among them: one may be the champion.

    Returns:
        Rows with `name`, `version`, `aliases`, `path` (folder that `from_pretrained` loads, or its URI when it is not
        on this machine), `metrics` and `tags`.

    Raises:
        TransientError: MLflow does not answer.
    """
    versions = _versions(config, store_root)
    shown = {each.name for each in versions if CHAMPION in each.aliases or _MANAGED_BY in each.tags}
    rows = [_row(each) for each in versions if each.name in shown]
    return sorted(rows, key=lambda row: (row["name"], -int(row["version"])))


def _versions(config: TrackingConfig, store_root: Path) -> list[Version]:
    """Return every version of every registered model; of a SQLite registry without MLflow where that can be."""
    uri = resolve_uri(config, store_root)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        versions = mlflow_database.versions(path) if path.exists() else []
        if versions is not None:
            return versions
    with reachable(uri, what="the model registry"):
        client = connect(config, store_root)
        return [
            Version(version.name, str(version.version), str(version.source), aliases, dict(version.tags))
            for model in client.search_registered_models()
            for version in client.search_model_versions(f"name = '{model.name}'")
            for aliases in [tuple(sorted(a for a, n in model.aliases.items() if str(n) == str(version.version)))]
        ]


def _row(version: Version) -> dict[str, Any]:
    tags = version.tags
    ours = _MANAGED_BY in tags
    metrics: dict[str, float] = {
        name: float(tags[name]) for name in ("bits_per_byte", "size_bytes") if ours and name in tags
    }
    metrics |= {name: float(value) for name, value in tags.items() if ours and name.startswith("accuracy.")}
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "path": _path(version),
        "metrics": metrics,
        "tags": tags,
    }


def _path(version: Version) -> str:
    place = f"{version.source}/{MODEL_FOLDER}" if _MANAGED_BY in version.tags else version.source
    parts = urlsplit(place)
    return unquote(parts.path) if parts.scheme == "file" else place
