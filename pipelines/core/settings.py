"""The base of every configuration section: frozen, self-validating, and clear about what is identity."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from models.closed import Closed

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`Field(json_schema_extra=NOT_IDENTITY)` marks a field that cannot change a result (worker counts, log level)."""

PATH: dict[str, Any] = {"path": True}
"""Marks a field that names a file, a folder or a SQLite database: typed on a command line it starts at the working
directory, in a recipe at the project."""

PROJECT = "project"
"""Key of a validation's context: the root of the project, where relative paths start; else the working directory."""

ELASTIC: dict[str, Any] = {"elastic": True}
"""`Field(json_schema_extra=ELASTIC)` marks a field that changes a result by rounding only (number of ranks, sharding):
it is identity, but a run that was cut short under one value may go on under another."""

B = TypeVar("B", bound=BaseModel)


_SQLITE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>[^/:?][^?]*)(?P<options>.*)")
"""A database that is named by a relative path."""


def absolute(path: str, start: Path | None = None) -> str:
    """Return a path, or the path in `sqlite:///PATH`, from its start on; any other URI as it is.

    Args:
        path: as written.
        start: where it starts if it is relative; None for the working directory.
    """
    if database := _SQLITE.fullmatch(path):
        return f"{database['scheme']}{absolute(database['path'], start)}{database['options']}"
    return path if ":/" in path else str(((start or Path()) / Path(path).expanduser()).resolve())


def is_file(path: Path) -> bool:
    """Tell whether a file is there; a path that the system cannot take (too long) is none."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def start_of(info: ValidationInfo) -> Path | None:
    """Return where the paths of a recipe start that is being validated."""
    return (info.context or {}).get(PROJECT)


class Settings(Closed):
    """One section of a recipe. Unknown keys are refused; values never change after validation."""

    needs: ClassVar[Mapping[str, str]] = {}
    """Key -> key without which it does nothing. In a section with the switch `enabled`, every other key needs that."""

    @property
    def measures_time(self) -> bool:
        """Whether the stage measures how fast something is, so that nothing of the same run may work beside it."""
        return False

    @property
    def ranks_and_cores(self) -> tuple[int, int]:
        """Processes that the stage spreads over its nodes, and the cores that all of them together can use."""
        return 1, 1

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a result, as JSON values: what enters a fingerprint."""
        return _fields(self, lambda extra: extra.get("identity") is not False)

    def resume_key(self) -> dict[str, Any]:
        """Return the identity without elastic fields: runs that agree in it can go on from each other's state."""
        return _fields(self, lambda extra: extra.get("identity") is not False and not extra.get("elastic"))


def validated_at(kind: type[B], table: Any, *place: str) -> B:
    """Return a table as the settings of a class that was found by name, `place` below the field that is validated.

    Raises:
        ValidationError: its errors carry the whole place, and an unknown key is told the known ones.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        details = [
            InitErrorDetails(type=_type(kind, e), loc=(*place, *e["loc"]), input=e["input"], ctx=e.get("ctx", {}))
            for e in error.errors()
        ]
        raise ValidationError.from_exception_data(kind.__name__, details) from None


def _type(kind: type[BaseModel], error: Any) -> str | PydanticCustomError:
    if error["type"] != "extra_forbidden" or len(error["loc"]) > 1:
        kept: str = error["type"]
        return kept
    reason = "not a key" + known_keys(str(error["loc"][0]), list(kind.model_fields))
    return PydanticCustomError("unknown_key", "{reason}", {"reason": reason})


def known_keys(key: str, valid: Sequence[str]) -> str:
    """Return what is added to the refusal of an unknown key: the nearest known one, and all of them."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]!r}?" if near else "") + f" (valid: {', '.join(valid) or 'none'})"


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
