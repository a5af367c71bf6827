"""A registered version as an artifact: found in the store where it was made, else downloaded and verified."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.registry import current
from pipelines.registry.evidence import OURS
from pipelines.registry.initial_weights import REGISTERED
from pipelines.registry.package import CARD, MODEL_FOLDER
from pipelines.registry.registry import Registry
from pipelines.tracking.client import connect, reachable
from pipelines.tracking.config import resolve_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Registered:
    """One registered version, its bytes verified."""

    name: str
    """Of the registered model."""
    version: str
    model: Artifact
    """The folder `model/` and what its manifest says of it."""
    card: str
    """The model card, Markdown."""

    @property
    def title(self) -> str:
        """Name and version, for programs that show what they have loaded."""
        return f"{self.name} v{self.version}"


@contextlib.contextmanager
def opened(wanted: str, store_root: Path) -> Iterator[Registered]:
    """Give a registered version for the length of the block, as the registry has it at this moment.

    Args:
        wanted: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        store_root: root of the store.

    Raises:
        ConfigError: there is no such version, or Ingot did not register it.
        IntegrityError: the registry no longer holds its bytes.
        TransientError: MLflow does not answer.
    """
    if (parts := REGISTERED.fullmatch(wanted)) is None:
        raise ConfigError(f"{wanted!r} names no registered model", hint="models:/NAME@champion or models:/NAME/3")
    config = current.where(store_root, parts["name"])
    uri = resolve_uri(config, store_root)
    with reachable(uri, what=wanted):
        registry = Registry(connect(config, store_root), uri, parts["name"], store_root)
        version = _version(registry, wanted, parts)
        with registry.verified(version) as folder:
            yield Registered(
                parts["name"], str(version.version), _artifact(folder), (folder / OURS / CARD).read_text("utf-8")
            )


def _version(registry: Registry, wanted: str, parts: re.Match[str]) -> ModelVersion:
    version = registry.by_alias(parts["alias"]) if parts["alias"] else registry.version(parts["version"])
    if version is None:
        raise ConfigError(
            f"{wanted}: the registry has no such model, version or alias",
            hint="`ingot list models` shows names, versions and aliases",
        )
    if "digest" not in version.tags:
        raise ConfigError(
            f"version {version.version} of {version.name} was not registered by Ingot: it has no manifest",
            hint=f"mlflow.artifacts.download_artifacts('models:/{version.name}/{version.version}') fetches it as it is",
        )
    return version


def _artifact(folder: Path) -> Artifact:
    """Return a downloaded version as an artifact of its model folder alone: the rest of it stayed in its store."""
    manifest = artifact.load(folder / OURS).manifest
    files = {name: record for name, record in manifest.files.items() if name.startswith(f"{MODEL_FOLDER}/")}
    return Artifact(folder, manifest.model_copy(update={"files": files}))
