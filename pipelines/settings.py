"""The base of every configuration section: frozen, self-validating, and clear about what is identity."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`Field(json_schema_extra=NOT_IDENTITY)` marks a field that cannot change a result (worker counts, log level)."""


class Settings(BaseModel):
    """One section of a recipe. Unknown keys are refused; values never change after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a result, as JSON values: what enters a fingerprint."""
        return {name: _identity_of(getattr(self, name)) for name in type(self).model_fields if self._is_identity(name)}

    @classmethod
    def _is_identity(cls, name: str) -> bool:
        extra = cls.model_fields[name].json_schema_extra
        return not (isinstance(extra, dict) and extra.get("identity") is False)


def _identity_of(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.identity()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_identity_of(child) for child in value]
    if isinstance(value, dict):
        return {key: _identity_of(child) for key, child in value.items()}
    return value
