"""The base of every configuration section: frozen, self-validating, and clear about what is identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`Field(json_schema_extra=NOT_IDENTITY)` marks a field that cannot change a result (worker counts, log level)."""

ELASTIC: dict[str, Any] = {"elastic": True}
"""`Field(json_schema_extra=ELASTIC)` marks a field that changes a result by rounding only (number of ranks, sharding):
it is identity, but a run that was cut short under one value may go on under another."""


class Settings(BaseModel):
    """One section of a recipe. Unknown keys are refused; values never change after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    needs: ClassVar[Mapping[str, str]] = {}
    """Key -> key without which it does nothing. In a section with the switch `enabled`, every other key needs that."""

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


def idle_keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, switch) of every key that was given and does nothing because its switch is off.

    It looks at what was written, not at values: a key that is given its default under a closed switch was meant to do
    something too. So it is asked of recipes; a configuration that was written out in full has every key.
    """
    if isinstance(value, list | tuple):
        for position, element in enumerate(value):
            yield from idle_keys(element, f"{path}.{position}")
    elif isinstance(value, dict):
        for key, element in value.items():
            yield from idle_keys(element, f"{path}.{key}")
    elif isinstance(value, Settings):
        switches = (
            dict.fromkeys(type(value).model_fields, "enabled") if "enabled" in type(value).model_fields else value.needs
        )
        for key in sorted(value.model_fields_set):
            where = f"{path}.{key}".removeprefix(".")
            if key != (switch := switches.get(key, key)) and not getattr(value, switch):
                yield where, f"{path}.{switch}".removeprefix(".")
            yield from idle_keys(getattr(value, key), where)


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
