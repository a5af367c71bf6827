"""Registered models as rows for `ingot list models`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipelines.registry.current import CHAMPION
from pipelines.registry.package import MODEL_FOLDER
from pipelines.tracking.client import connect, reachable
from pipelines.tracking.config import TrackingConfig, resolve_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

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
    uri = resolve_uri(config, store_root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []
    with reachable(uri, what="the model registry"):
        client = connect(config, store_root)
        versions = [
            _row(version, [alias for alias, number in model.aliases.items() if str(number) == str(version.version)])
            for model in client.search_registered_models()
            if (found := client.search_model_versions(f"name = '{model.name}'"))
            and (CHAMPION in model.aliases or any(_MANAGED_BY in version.tags for version in found))
            for version in found
        ]
    return sorted(versions, key=lambda row: (row["name"], -int(row["version"])))


def _row(version: ModelVersion, aliases: list[str]) -> dict[str, Any]:
    tags = dict(version.tags)
    ours = _MANAGED_BY in tags
    metrics = {name: float(tags[name]) for name in ("bits_per_byte", "size_bytes") if ours and name in tags}
    metrics |= {name: float(value) for name, value in tags.items() if ours and name.startswith("accuracy.")}
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(aliases),
        "path": _path(version),
        "metrics": metrics,
        "tags": tags,
    }


def _path(version: ModelVersion) -> str:
    place = f"{version.source}/{MODEL_FOLDER}" if _MANAGED_BY in version.tags else str(version.source)
    parts = urlsplit(place)
    return unquote(parts.path) if parts.scheme == "file" else place
