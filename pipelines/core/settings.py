"""The base of every configuration section: frozen, self-validating, and clear about what is identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`Field(json_schema_extra=NOT_IDENTITY)` marks a field that cannot change a result (worker counts, log level)."""

ELASTIC: dict[str, Any] = {"elastic": True}
"""`Field(json_schema_extra=ELASTIC)` marks a field that changes a result by rounding only (number of ranks, sharding):
it is identity, but a run that was cut short under one value may go on under another."""


class Settings(BaseModel):
    """One section of a recipe. Unknown keys are refused; values never change after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @property
    def measures_time(self) -> bool:
        """Whether the stage measures how fast something is, so that nothing of the same run may work beside it."""
        return False

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a result, as JSON values: what enters a fingerprint."""
        return _fields(self, lambda extra: extra.get("identity") is not False)

    def resume_key(self) -> dict[str, Any]:
        """Return the identity without elastic fields: runs that agree in it can go on from each other's state."""
        return _fields(self, lambda extra: extra.get("identity") is not False and not extra.get("elastic"))


def _fields(section: BaseModel, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    extras = {name: field.json_schema_extra for name, field in type(section).model_fields.items()}
    return {
        name: _as_json(getattr(section, name), wanted)
        for name, extra in extras.items()
        if wanted(extra if isinstance(extra, dict) else {})
    }


def _as_json(value: Any, wanted: Callable[[dict[str, Any]], bool]) -> Any:
    if isinstance(value, BaseModel):
        return _fields(value, wanted)
    if isinstance(value, list | tuple):
        return [_as_json(child, wanted) for child in value]
    if isinstance(value, dict):
        return {key: _as_json(child, wanted) for key, child in value.items()}
    return value
