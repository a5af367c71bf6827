"""The base of every settings class: frozen, closed to unknown keys, and `none` unsets a key that may be unset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

UNSET = ("none", "null")
"""What a recipe or a command line writes for None; TOML has no value for it."""


class Closed(BaseModel):
    """Settings that never change after validation and refuse keys that they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _none_unsets(cls, table: Any) -> Any:
        """Take `none` for None where a key may be None and has no value of that name."""
        if not isinstance(table, Mapping):
            return table
        optional = {
            key
            for name, field in cls.model_fields.items()
            if may_be_none(field.annotation)
            for key in (name, field.alias)
        }
        return {
            key: None if key in optional and isinstance(value, str) and value.lower() in UNSET else value
            for key, value in table.items()
        }


def may_be_none(kind: Any) -> bool:
    """Tell whether a field of this type may be unset by `none`: it takes None, and `none` is no value of its own."""
    parts = get_args(kind)
    words = {word for part in parts if get_origin(part) is Literal for word in get_args(part)}
    return type(None) in parts and not words & set(UNSET)
