"""Recipes: named TOML files, one level of inheritance after another, and dotted overrides from the command line."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from flows import renamed_keys
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import redact_value
from pipelines.core.settings import idle_keys

if TYPE_CHECKING:
    from flows.config import RunConfig

RECIPES = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """Return the names of the recipes that come with the checkout."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def description(name: str) -> str:
    """Return the first comment line of a recipe."""
    first = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ")


def resolve(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the validated `RunConfig` of a recipe with overrides.

    Args:
        recipe: a name from `names()` or the path of a TOML file.
        overrides: `dotted.path=value`; the value is TOML, or a plain string where it is not valid TOML.

    Raises:
        ConfigError: naming the dotted path, the value, and the nearest valid name or range; the new name of a key that
            was renamed; keys that do nothing because the switch of their section is off.
    """
    from flows.config import RunConfig

    table = load(recipe)
    for override in overrides:
        apply(table, override)
    renamed_keys.refuse(table)
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(RunConfig, e) for e in error.errors())) from None
    if idle := list(idle_keys(config)):
        lines = [f"{key} does nothing while {switch} is off" for key, switch in idle]
        raise ConfigError("\n".join(lines), hint="switch it on, or leave the key out")
    return config


def load(recipe: str) -> dict[str, Any]:
    """Return the merged table of a recipe and of what it extends."""
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, names(), n=1)
        raise ConfigError(
            f"there is no recipe {recipe!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"recipes: {', '.join(names())}; or give the path of a .toml file",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    base = table.pop("extends", None)
    return table if base is None else merge(load(_sibling(base, path)), table)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `top` laid over it; tables merge, everything else is replaced.

    A table that switches its section off replaces the one below it: what that says of the section does nothing now.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in top.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        both_tables = both_tables and value.get("enabled") is not False
        merged[key] = merge(merged[key], value) if both_tables else copy.deepcopy(value)
    return merged


def apply(table: dict[str, Any], override: str) -> None:
    """Set one `dotted.path=value` in place.

    In a list, a number picks one element; any other key is set in every element.

    Raises:
        ConfigError: no `=`, or the path runs through something that is not a table.
    """
    path, found, text = override.partition("=")
    if not found or not path:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    _set(table, path.split("."), _value(text), path)


def _sibling(base: str, path: Path) -> str:
    return str(path.parent / base) if base.endswith(".toml") else base


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(node: Any, keys: list[str], value: Any, path: str) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        for element in _elements(node, key, path):
            _set(element, rest if key.isdigit() else keys, value, path)
    elif not isinstance(node, dict):
        raise ConfigError(f"{path}: {key!r} is inside {node!r}, which is not a table")
    elif rest:
        _set(node.setdefault(key, {}), rest, value, path)
    else:
        if key == "enabled" and value is False:
            node.clear()  # the last word: nothing that was said of the section before has an effect
        node[key] = value


def _elements(node: list[Any], key: str, path: str) -> list[Any]:
    if not key.isdigit():
        return node
    if int(key) >= len(node):
        raise ConfigError(f"{path}: there is no element {key}; the list has {len(node)}, counted from 0")
    return [node[int(key)]]


def _explain(root: type[BaseModel], error: Any) -> str:
    """Say in one line what pydantic found: dotted path, value, reason, nearest name."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _fields(root, error["loc"][:-1]), n=1, cutoff=0.5)
        return f"{path} is not a key" + (f"; did you mean {near[0]!r}?" if near else "")
    reason = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" = {redact_value(str(error['loc'][-1]), error['input'])!r}"
    return f"{path}{shown}: {reason}" if path else reason


def _fields(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the field names of the section at `location`."""
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else model
        model = next((a for a in getattr(model, "__args__", ()) if hasattr(a, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
