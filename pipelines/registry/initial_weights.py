"""What a run starts from: a registered model, an artifact or a Hugging Face folder, pinned to its bytes.

`models:/NAME@champion` names other weights tomorrow. What enters an identity is therefore the digest of the weight
files, the configuration and the tokenizer, found out when the plan is made; the name that led to them is only
remembered.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifact, fingerprint
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.registry.evidence import OURS
from pipelines.registry.package import MODEL_FOLDER, downloaded
from pipelines.tracking.client import connect, reachable
from pipelines.tracking.config import TrackingConfig, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")
"""`models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
_CONFIG = "config.json"
_READ = {".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Endings of the files that say what a model computes, and of which tokens; not those of its documentation."""


@dataclass(frozen=True)
class Source:
    """A model to start from, pinned."""

    place: str
    """`models:/NAME/VERSION`, or the folder."""
    weights: str
    """sha256 over the weight files, the configuration and the tokenizer."""
    origin: str
    """Fingerprint of the artifact that the weights come from; empty for a folder that is none."""
    note: str
    """What the user's words resolved to, for the plan."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its config.json."""


def resolve(wanted: str, config: TrackingConfig, store_root: Path, project: Path) -> Source:
    """Return what `base.from` names at this moment.

    Args:
        wanted: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the path of an artifact or of a model folder.
        config: where the registry is.
        store_root: root of the store.
        project: where a relative path starts.

    Raises:
        ConfigError: there is no such model, or it holds no weights.
        TransientError: MLflow does not answer.
    """
    if (parts := REGISTERED.fullmatch(wanted)) is None:
        return _of_folder(project / Path(wanted).expanduser())
    with _connected(config, store_root) as (client, uri):
        version = _version(client, wanted, parts)
        manifest = _manifest(client, uri, version, store_root)
        with downloaded(client, uri, version, f"{MODEL_FOLDER}/{_CONFIG}", store_root) as file:
            config_json = read_config(file)
    place = f"models:/{version.name}/{version.version}"
    weights = weights_digest({_inside(n): r.sha256 for n, r in manifest.files.items() if _inside(n)})
    named = place if wanted == place else f"{wanted} is version {version.version}"
    return Source(
        place,
        weights,
        manifest.fingerprint,
        f"{named}, made by {manifest.node} {manifest.fingerprint[:8]}, weights {weights[:8]}",
        config_json,
    )


@contextlib.contextmanager
def opened(place: str, config: TrackingConfig, store_root: Path) -> Iterator[Path]:
    """Give the model folder of a source for the length of the block, downloaded if it is registered.

    Raises:
        ConfigError: there is no such model.
        TransientError: MLflow does not answer.
    """
    if (parts := REGISTERED.fullmatch(place)) is None:
        yield model_folder(Path(place))
        return
    with _connected(config, store_root) as (client, uri):
        version = _version(client, place, parts)
        with downloaded(client, uri, version, MODEL_FOLDER, store_root) as folder:
            yield folder


def folder_digest(folder: Path) -> str:
    """Return the sha256 over the weight files of a model folder, its configuration and its tokenizer."""
    return weights_digest({path.name: fingerprint.hash_file(path) for path in folder.iterdir() if _counts(path)})


def weights_digest(files: Mapping[str, str]) -> str:
    """Return the sha256 over what a model is made of among `files`, file name -> sha256.

    Raises:
        ConfigError: there are none.
    """
    weights = {name: sha for name, sha in files.items() if _counts(Path(name))}
    if not any(name.endswith(".safetensors") for name in weights):
        raise ConfigError(
            "base.from: the model to start from holds no safetensors weights",
            hint="pickled weights (.bin, .pt) are never read: save them with safetensors first, as "
            "`model.save_pretrained(folder)` of transformers does",
        )
    return fingerprint.digest(weights)


def model_folder(path: Path) -> Path:
    """Return the folder with the weights: that of an artifact, or the one that was named.

    Raises:
        ConfigError: it is neither.
    """
    folder = path / MODEL_FOLDER if (path / artifact.MANIFEST).is_file() else path
    if not (folder / _CONFIG).is_file():
        raise ConfigError(
            f"base.from = {str(path)!r}: {folder} is no model folder, it has no config.json",
            hint="give models:/NAME@champion, models:/NAME/3, an artifact, or a Hugging Face folder",
        )
    return folder


def _of_folder(path: Path) -> Source:
    folder = model_folder(path)
    source = artifact.load(path) if folder != path else None
    weights = folder_digest(folder)
    by = f", made by {source.manifest.node} {source.manifest.fingerprint[:8]}" if source else ""
    origin = source.manifest.fingerprint if source else ""
    note = f"{path}{by}, weights {weights[:8]}"
    return Source(str(path.resolve()), weights, origin, note, read_config(folder / _CONFIG))


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"base.from: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"base.from: {path} is no JSON object")
    return found


def _inside(name: str) -> str:
    """Return a file's name inside the model folder of an artifact; empty for files outside of it."""
    return name.removeprefix(f"{MODEL_FOLDER}/") if name.startswith(f"{MODEL_FOLDER}/") else ""


def _counts(path: Path) -> bool:
    """Tell whether a file says what the model computes, and of which tokens."""
    return path.suffix in _READ


@contextlib.contextmanager
def _connected(config: TrackingConfig, store_root: Path) -> Iterator[tuple[MlflowClient, str]]:
    uri = resolve_uri(config, store_root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(
            f"there is no model registry at {uri}",
            hint="`ingot run` registers a first model; or set tracking.uri (MLFLOW_TRACKING_URI)",
        )
    with reachable(uri, what="the model to start from"):
        yield connect(config, store_root), uri


def _version(client: MlflowClient, wanted: str, parts: re.Match[str]) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        if parts["alias"] is not None:
            return client.get_model_version_by_alias(parts["name"], parts["alias"])
        return client.get_model_version(parts["name"], parts["version"])
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        raise ConfigError(
            f"base.from = {wanted!r}: the registry has no such model, version or alias",
            hint="`ingot list models` shows names, versions and aliases",
        ) from error


def _manifest(client: MlflowClient, uri: str, version: ModelVersion, store_root: Path) -> artifact.Manifest:
    """Fetch the manifest that Ingot registered with a version: a plan needs hashes, not gigabytes."""
    from mlflow.exceptions import MlflowException

    try:
        with downloaded(client, uri, version, f"{OURS}/{artifact.MANIFEST}", store_root) as file:
            return artifact.Manifest.model_validate(json.loads(file.read_bytes()))
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"version {version.version} of {version.name} was not registered by Ingot: it has no manifest",
            hint="download it and give the folder as base.from",
        ) from error
    except ValueError as error:
        raise IntegrityError(f"the manifest of {version.name} version {version.version} is damaged: {error}") from error
