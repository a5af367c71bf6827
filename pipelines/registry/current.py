"""The champion of this moment: what the registry's alias says, for commands that only look.

A SQLite registry is asked without MLflow, whose import takes seconds that `ingot plan` does not have: see
`mlflow_database`. Every other registry is left to MLflow itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from pipelines.core.errors import IntegrityError
from pipelines.registry import history, mlflow_database
from pipelines.registry.history import Record
from pipelines.tracking.config import TrackingConfig, resolve_uri

CHAMPION = "champion"
"""The alias."""
PROMOTED_BY = "ingot.promoted_by"
"""Tag of a version that was champion: who made it so, when and why."""


def champion(config: TrackingConfig, store_root: Path, model: str) -> Record | None:
    """Return the version that the alias names, None when there is none; changes nothing.

    Args:
        config: where the registry is.
        store_root: root of the store.
        model: name of the registered model.

    Returns:
        The record of how it became champion if this store knows that (see `history`), else `model`, `version`, and of
        its tags those in `history.NOTED` and `bits_per_byte` where it has them.

    Raises:
        TransientError: MLflow does not answer.
    """
    named = _ask(resolve_uri(config, store_root), config, store_root, model)
    if named is None:
        return None
    version, tags = named
    known = history.champion(store_root, model)
    if known is not None and known["version"] == version and known.get("fingerprint") == tags.get("fingerprint"):
        return known
    record: Record = {"model": model, "version": version, "action": history.OBSERVED, "why": moved_by(tags)}
    record |= {name: tags[name] for name in history.NOTED if name in tags}
    return record | _quality(tags)


def moved_by(tags: Mapping[str, str]) -> str:
    """Say what is known about an alias that another store, or somebody, moved."""
    try:
        promoter = json.loads(tags[PROMOTED_BY])
        return f"alias found moved; {promoter['who']} at {promoter['time']}: {promoter['why']}"
    except (KeyError, TypeError, ValueError):  # no such tag, or somebody wrote one
        return "alias found moved by hand"


def where(store_root: Path, model: str | None = None) -> TrackingConfig:
    """Return the MLflow that a model was last registered with; the environment's and the store's own come after.

    Raises:
        IntegrityError: the history names something else.
    """
    records = [r for r in history.read(store_root, model) if "tracking_uri" in r] if model else []
    if not records or "MLFLOW_TRACKING_URI" in os.environ:
        return TrackingConfig()
    try:
        return TrackingConfig(uri=records[-1]["tracking_uri"])
    except ValidationError as error:
        raise IntegrityError(
            f"{store_root / history.HISTORY} is damaged: tracking_uri of {model}: {error.errors()[0]['msg']}",
            hint="let $MLFLOW_TRACKING_URI name the registry, or correct that line",
        ) from None


def _quality(tags: Mapping[str, str]) -> dict[str, float]:
    try:
        return {"bits_per_byte": float(tags["bits_per_byte"])}
    except (KeyError, ValueError):  # registered by somebody else
        return {}


def _ask(uri: str, config: TrackingConfig, store_root: Path, model: str) -> tuple[str, dict[str, str]] | None:
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():
            return None
        if (versions := mlflow_database.versions(path)) is not None:
            named = (each for each in versions if each.name == model and CHAMPION in each.aliases)
            return next(((each.version, each.tags) for each in named), None)
    from mlflow.exceptions import MlflowException

    from pipelines.tracking.client import connect, reachable

    with reachable(uri, what=f"the champion of {model}"):
        try:
            version = connect(config, store_root).get_model_version_by_alias(model, CHAMPION)
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise
    return str(version.version), dict(version.tags)
