"""Recipes: named TOML files, one level of inheritance after another, and dotted overrides from the command line.

A run can stand in a recipe's place: it is the configuration that it had.
"""

from __future__ import annotations

import copy
import datetime as dt
import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from flows import renamed_keys
from models.closed import UNSET, may_be_none
from pipelines.core import project as projects
from pipelines.core.errors import ConfigError
from pipelines.core.redaction import HIDDEN, redact_value
from pipelines.core.settings import PROJECT, absolute, idle_keys, is_file

if TYPE_CHECKING:
    from flows.config import RunConfig
    from flows.run_record import RunRecord

RECIPES = Path(__file__).parent / "recipes"
_LONGEST_NAME = 80
"""What is shown of a name that is none."""
_LONGEST_VALUE = 200
"""What is shown of a value that is refused."""


def names(project: Path | None = None) -> list[str]:
    """Return the names of the recipes that come with the program, and of those of a project."""
    folders = [RECIPES, *([project / projects.RECIPES] if project else [])]
    return sorted({path.stem for folder in folders for path in folder.glob("*.toml")})


def description(name: str, project: Path | None = None) -> str:
    """Return the first comment line of a recipe."""
    first = _file(name, project).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ")


def from_here(name: str | None, overrides: Sequence[str], project: Path | None) -> tuple[str, list[str]]:
    """Return a recipe and overrides as a command line means them, so that they mean the same in any other folder.

    A path that was typed starts at the working directory; one in a recipe starts at the project.

    Args:
        name: what was typed; None for the project's own recipe.
        overrides: as typed.
        project: root of the project; None outside of one.

    Raises:
        ConfigError: no recipe was named and there is no project to name one.
    """
    if name is None:
        root = project or projects.find()
        name = projects.settings(root).recipe
        name = str(root / name) if name.endswith(".toml") else name
    elif name.endswith(".toml"):
        name = str(Path(name).expanduser().resolve())
    return name, [_absolute(override) for override in overrides]


def _absolute(override: str) -> str:
    from flows.config import RunConfig

    key, _, text = override.partition("=")
    kind, extra = _field(RunConfig, {}, key.split("."))
    value = _value(text, kind)
    started = _started(value, kind, extra)
    return override if started == value else f"{key}={started if isinstance(started, str) else _inline(started)}"


def _started(value: Any, kind: Any, extra: Mapping[str, Any]) -> Any:
    """Return the value of a field with the paths in it made absolute, from the working directory on."""
    section = _section(kind)
    if isinstance(value, str) and value.lower() in UNSET and may_be_none(kind):
        return value
    if isinstance(value, list):
        return [_started(element, kind, {}) for element in value]
    if isinstance(value, dict) and section is not None:
        return {key: _started(inner, *_field(section, {}, [key])) for key, inner in value.items()}
    named = isinstance(value, str) and value and value not in extra.get("words", ())
    return absolute(value) if extra.get("path") and named else value


def _inline(value: Any) -> str:
    """Return a list or a table as TOML on one line."""
    import tomlkit

    table = tomlkit.inline_table()
    table["value"] = value
    return table["value"].as_string()


def _field(kind: Any, extra: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """Return type and notes (`json_schema_extra`) of the field at the end of `keys`; None for one that is not there."""
    if not keys:
        return kind, extra
    section = _section(kind)
    if keys[0].isdigit():  # an element of a list, which has the same settings as any other
        return _field(kind, {}, keys[1:])
    by_name = {field.alias or name: field for name, field in (section.model_fields if section else {}).items()}
    if (field := by_name.get(keys[0])) is None:
        return None, {}
    noted = field.json_schema_extra
    return _field(field.annotation, noted if isinstance(noted, dict) else {}, keys[1:])


def _section(kind: Any) -> type[BaseModel] | None:
    """Return the settings that a field holds, itself or as elements of a list."""
    kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
    return kinds[0] if kinds else None


def resolve(recipe: str, overrides: Sequence[str] = (), project: Path | None = None) -> RunConfig:
    """Return the validated `RunConfig` of a recipe with overrides.

    Args:
        recipe: a name from `names()`, the path of a TOML file, or the id of a run, whose configuration is taken.
        overrides: `dotted.path=value`; the value is TOML, or a plain string where it is not valid TOML.
        project: root of the project, whose recipes come before those of the program, and whose runs are known; None
            for the recipes of the program alone.

    Raises:
        ConfigError: naming the dotted path, the value, and the nearest valid name or range; the new name of a key that
            was renamed; keys that do nothing because the switch of their section is off.
    """
    if not overrides and (run := run_called(recipe, project)) is not None:
        return validated(run.table(full=True), project)
    table = load(recipe, project)
    for override in overrides:
        apply(table, override)
    config = validated(table, project)
    if idle := list(idle_keys(config)):
        lines = [f"{key} does nothing while {switch} is off" for key, switch in idle]
        raise ConfigError("\n".join(lines), hint="switch it on, or leave the key out")
    return config


def validated(table: Mapping[str, Any], project: Path | None = None) -> RunConfig:
    """Return the `RunConfig` of a whole table, in which a key that does nothing may stand.

    Args:
        table: what a recipe says, with everything that it extends.
        project: where relative paths start; None for the working directory.

    Raises:
        ConfigError: see `resolve`.
    """
    from flows.config import RunConfig

    renamed_keys.refuse(dict(table))
    try:
        return RunConfig.model_validate(table, context={PROJECT: project})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(RunConfig, e) for e in error.errors())) from None


def to_toml(config: RunConfig) -> str:
    """Return a recipe that resolves to this configuration: what was set, without secrets."""
    import tomlkit

    table = redact_value("", config.model_dump(mode="json", exclude_unset=True))
    lost = list(_drop(table, "", lambda value: isinstance(value, str) and HIDDEN in value))
    _say_none(table)
    notes = [f"# {path} held a secret and is left out\n" for path in lost]
    return "".join(notes) + tomlkit.dumps(table)


def _drop(node: Any, path: str, wanted: Callable[[Any], bool]) -> Iterator[str]:
    """Remove the keys with such values from a table, and yield their dotted paths."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        where = f"{path}.{key}".removeprefix(".")
        if isinstance(key, str) and wanted(node[key]):
            del node[key]
            yield where
        else:
            yield from _drop(node[key], where, wanted)


def _say_none(node: Any) -> None:
    """Put the word for it in the place of every None: TOML has no value of its own."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        if node[key] is None:
            node[key] = UNSET[0]
        else:
            _say_none(node[key])


def _remove(node: Any, keys: list[str]) -> None:
    key = int(keys[0]) if isinstance(node, list) else keys[0]
    if len(keys) == 1:
        del node[key]
    else:
        _remove(node[key], keys[1:])


def run_called(name: str, project: Path | None) -> RunRecord | None:
    """Return the run of a project's default store with this id or the only one whose id begins so; recipes come first.

    Raises:
        ConfigError: several runs begin so.
    """
    if project is None or name.endswith(".toml") or name in names(project):
        return None
    from flows.config import StoreConfig
    from flows.run_record import Runs
    from pipelines.core.store import open_store

    runs = Runs(open_store(StoreConfig().path, project).root)
    return runs.get(name) if runs.named(name) else None


def load(recipe: str, project: Path | None = None) -> dict[str, Any]:
    """Return the merged table of a recipe and of what it extends."""
    if (run := run_called(recipe, project)) is not None:
        table = run.table(full=False)
        if run.selection is None:  # an older version, which kept every setting and not which of them were set
            for path, _ in list(idle_keys(validated(table))):
                _remove(table, path.split("."))
        return table
    return _load(_file(recipe, project), project, ())


def _load(path: Path, project: Path | None, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise ConfigError(f"{path} extends itself: {' -> '.join(str(each) for each in (*above, path))}")
    table = projects.read_toml(path)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: extends = {base!r} names no recipe", hint='extends = "NAME", or the path of a file')
    below = _file(str(path.parent / base) if base.endswith(".toml") else base, project, extending=path)
    return merge(_load(below, project, (*above, path)), table)


def _file(recipe: str, project: Path | None, extending: Path | None = None) -> Path:
    """Return the file of a recipe: a project's own before the program's of the same name, which it may extend.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    if recipe.endswith(".toml"):
        candidates = [Path(recipe)]
    else:
        folders = [*([project / projects.RECIPES] if project else []), RECIPES]
        candidates = [path for folder in folders if (path := folder / f"{recipe}.toml") != extending]
    if found := [path for path in candidates if is_file(path)]:
        return found[0]
    if extending is not None and extending.stem == recipe:
        raise ConfigError(f"{extending} extends itself", hint="no other recipe has its name: extend another one")
    recipe = recipe if len(recipe) <= _LONGEST_NAME else f"{recipe[:_LONGEST_NAME]}..."
    near = difflib.get_close_matches(recipe, names(project), n=1)
    raise ConfigError(
        f"there is no recipe {recipe!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        hint=f"recipes: {', '.join(names(project))}; or give the path of a .toml file, or a run",
    )


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
    from flows.config import RunConfig

    keys = path.split(".")
    _set(table, keys, _value(text, _field(RunConfig, {}, keys)[0]), path)


def _value(text: str, kind: Any) -> Any:
    """Return what was typed for a field of this type: TOML, or text as it stands.

    Text is also what reads as a number, a date or a truth value where the field wants text.
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    value = table["value"] if len(table) == 1 else text
    is_text = str in (kind, *get_args(kind)) and isinstance(value, bool | int | float | dt.date | dt.time)
    return text if is_text and type(value) not in get_args(kind) else value


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
        keys = _keys(root, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), keys, n=1, cutoff=0.5)
        return f"{path} is not a key; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}")
    reason = error["msg"].removeprefix("Value error, ")
    said = repr(redact_value(str(error["loc"][-1] if error["loc"] else ""), error["input"]))
    said = said if len(said) <= _LONGEST_VALUE else f"{said[:_LONGEST_VALUE]}..."
    shown = "" if isinstance(error["input"], dict) else f" = {said}"
    return f"{path}{shown}: {reason}{_written(error, path)}" if path else reason


def _written(error: Any, path: str) -> str:
    """Return how a value of the wrong type is written, where that can be guessed."""
    value = error["input"]
    if error["type"] in {"list_type", "tuple_type"} and isinstance(value, dict):
        return f"; write [[{path}]], in double brackets, once for each"
    if error["type"] in {"list_type", "tuple_type"} and isinstance(value, str) and "," in value:
        return f"; write it in brackets: [{value}]"
    if error["type"] == "string_type" and isinstance(value, bool | int | float | dt.date | dt.time):
        return f'; write it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    return ""


def _keys(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys of the section at `location`, as a recipe writes them."""
    section = _section(_field(root, {}, [str(part) for part in location])[0])
    return [field.alias or name for name, field in section.model_fields.items()] if section else []
