"""Write the pages of docs/reference that are made from the code: `make docs`.

    python infra/reference_pages.py            # write them
    python infra/reference_pages.py --check    # say which differ; exit 1 if any does

`cli.md` comes from the command line's own help, `recipe-keys.md` from the JSON schema of the configuration (what
`ingot show schema` prints), `renamed-keys.md` from the table that refuses old names, `methods.md` from the registry of
compression methods. The pages are committed, so that they can be read on the web. `methods.md` may lag behind: a method
added since the last `make docs` is no fault, so that adding one stays one file and one test; a row that contradicts the
code is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from flows import renamed_keys  # noqa: E402
from flows.cli import app  # noqa: E402 - the checkout may not be installed
from flows.commands.options import EVERYWHERE  # noqa: E402
from flows.config import RunConfig  # noqa: E402
from models.architectures.config import (  # noqa: E402
    DEMO_VOCABULARY,
    PRESETS,
    ArchitectureConfig,
    count_embedding,
    count_parameters,
    preset,
)
from models.compression import registry  # noqa: E402

REFERENCE = CHECKOUT / "docs" / "reference"
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Return the text of every generated page, by file name."""
    return {
        "cli.md": cli(),
        "recipe-keys.md": recipe_keys(),
        "renamed-keys.md": renamed(),
        "methods.md": methods(),
    }


def differences() -> list[str]:
    """Return what the committed pages say that the code does not, one line each."""
    wrong = []
    for name, text in pages().items():
        committed = (REFERENCE / name).read_text(encoding="utf-8")
        if name == "methods.md":
            known = set(text.splitlines())
            wrong += [f"{name}: {line}" for line in committed.splitlines() if line not in known]
        elif committed != text:
            wrong.append(f"{name}: differs")
    return wrong


def cli() -> str:
    """Return the page of all verbs with their arguments and options."""
    verbs = list(_verbs(typer.main.get_command(app), "ingot"))
    common = [parameter for parameter in verbs[0][1].params if parameter.name in EVERYWHERE]
    parts = [
        "# The command line",
        "Made by `make docs` from the command's own help. Exit codes: [exit-codes.md](exit-codes.md).",
        "Settings are dotted overrides over a recipe, `section.key=value`: [recipe-keys.md](recipe-keys.md).",
        "Every verb also takes:",
        _table(("option", "default", "meaning"), [_parameter(parameter) for parameter in common]),
        "`ingot --version` prints the versions of Ingot, of Python and of what it stands on.",
        "`ingot --install-completion` has the shell complete verbs, recipes, runs, stages, models and settings.",
    ]
    for path, verb in verbs:
        parts += [f"## {path}", (verb.help or "").strip()]
        rows = [_parameter(parameter) for parameter in verb.params if parameter.name not in EVERYWHERE]
        if rows:
            parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _verbs(command: Any, path: str) -> Iterable[tuple[str, Any]]:
    for name, verb in command.commands.items():
        if hasattr(verb, "commands"):
            yield from _verbs(verb, f"{path} {name}")
        else:
            yield f"{path} {name}", verb


def _parameter(parameter: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        name = name if parameter.required or name.startswith("[") else f"[{name}]"
    else:
        name = ", ".join(parameter.opts) + ("" if parameter.is_flag else " VALUE")
    plain = parameter.default is None or parameter.is_flag if hasattr(parameter, "is_flag") else True
    default = "" if plain or parameter.required else f"`{parameter.default}`"
    return f"`{name}`", default, getattr(parameter, "help", "") or ""


def recipe_keys() -> str:
    """Return the page of all keys of a recipe, section by section."""
    schema = RunConfig.model_json_schema()
    parts = [
        "# Keys of a recipe",
        "Made by `make docs` from the schema that `ingot show schema` prints.",
        "A recipe is a TOML file; `extends` names another one to start from. An unknown key is refused.",
        "The column *identity* says what a change does.",
        (
            "* *yes*: the stage runs again.\n"
            "* *elastic*: the result changes by rounding only; the stage runs again, but unfinished work goes on.\n"
            "* *no*: nothing runs again."
        ),
    ]
    for name, section in schema["properties"].items():
        parts += _section(name, section, schema["$defs"], lists=name == "compress")
    parts += [
        "## Presets",
        "Parameters of `pretrain.preset`; the name is the number at the vocabulary of `demo`.",
        presets(),
    ]
    return "\n\n".join(parts) + "\n"


def presets() -> str:
    """Return the table of model sizes: parameters without embeddings and at two vocabularies."""
    ids = {"bos_id": 0, "eos_id": 0, "pad_id": 0, "mask_id": 0, "max_positions": 2}
    rows = []
    for name in PRESETS:
        shape = preset("decoder", name)
        small, large = (
            ArchitectureConfig(**shape.model_dump(), **ids, vocab_size=vocabulary)
            for vocabulary in (DEMO_VOCABULARY, 32_000)
        )
        counts = (count_parameters(small) - count_embedding(small), count_parameters(small), count_parameters(large))
        rows.append((f"`{name}`", str(shape.width), str(shape.layers), *(f"{count / 1e6:,.2f} M" for count in counts)))
    return _table(("preset", "width", "layers", "without embeddings", "4,096 tokens", "32,000 tokens"), rows)


def _section(path: str, schema: Schema, definitions: Schema, *, lists: bool) -> list[str]:
    """Return the text of one section and of the sections inside it."""
    target = _target(schema, definitions)
    if target is None:
        return []
    parts = [
        f"## {f'[[{path}]]' if lists else path}",
        str(schema.get("description") or target.get("description") or ""),
    ]
    if path == "compress":
        parts.append("Keys of the method stand beside these; [methods.md](methods.md) has them.")
    rows, inner = [], []
    for key, value in target["properties"].items():
        if key == "parameters":
            continue
        deeper = _section(f"{path}.{key}", value, definitions, lists=_is_list(value))
        inner += deeper
        if not deeper:
            rows.append(
                (f"`{key}`", _type(value), _default(value, key, target), _identity(value), value.get("description", ""))
            )
    if rows:
        parts.append(_table(("key", "type", "default", "identity", "meaning"), rows))
    return parts + inner


def _target(schema: Schema, definitions: Schema) -> Schema | None:
    """Return the section that a key holds: directly, or none, or in a list; None where it holds a value."""
    for option in (schema, *schema.get("anyOf", ()), *schema.get("allOf", ()), schema.get("items", {})):
        if "$ref" in option:
            found = definitions[option["$ref"].rsplit("/", 1)[1]]
            return found if found.get("type") == "object" else None
    return None


def _is_list(schema: Schema) -> bool:
    return any(option.get("type") == "array" for option in (schema, *schema.get("anyOf", ())))


def _type(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join("none" if option.get("type") == "null" else _type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    limits = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
    shown = [form.format(f"{schema[name]:g}" if isinstance(schema[name], float) else schema[name])
             for name, form in limits.items() if name in schema]  # fmt: skip
    return " ".join([str(schema.get("type", "any")), ", ".join(shown)]).strip()


def _default(schema: Schema, key: str, target: Schema) -> str:
    if key in target.get("required", ()):
        return "required"
    if "default" not in schema:
        return ""
    return "none" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"


def _identity(schema: Schema) -> str:
    if schema.get("identity") is False:
        return "no"
    return "elastic" if schema.get("elastic") else "yes"


def renamed() -> str:
    """Return the page of old names of keys and values."""
    keys = [(f"`{old}`", f"`{new}`") for old, new in sorted(renamed_keys.KEYS.items())]
    values = [(f"`{path} = {old!r}`", f"`{new!r}`") for (path, old), new in sorted(renamed_keys.VALUES.items())]
    parts = [
        "# Renamed keys",
        "Made by `make docs`. A recipe with an old name is refused, and the message names the new one.",
        "`*` is a position in a list; `*(optin)` is a position whose method is `optin`.",
        _table(("old key", "new key"), keys),
        _table(("old value", "new value"), values),
    ]
    return "\n\n".join(parts) + "\n"


def methods() -> str:
    """Return the page of all compression methods and their keys."""
    parts = [
        "# Compression methods",
        "Made by `make docs` from the registry. `ingot list compressors` knows also what was added since.",
        _table(
            ("method", "kind", "bits", "calibration", "paper"),
            [tuple(registry.describe(name).values()) for name in registry.names()],
        ),
        "Every `[[compress]]` table takes the keys of its method beside those of [recipe-keys.md](recipe-keys.md).",
    ]
    common = set.intersection(*(set(_keys(name)) for name in registry.names("training")))
    parts += [
        "## Every training method",
        _key_table([row for row in _keys(registry.names("training")[0]) if row in common]),
    ]
    for name in registry.names():
        rows = [row for row in _keys(name) if row not in common]
        parts += [
            f"## {name}",
            _key_table([(f"`{name}`", *row) for row in rows], "method") if rows else "No key of its own.",
        ]
    return "\n\n".join(parts) + "\n"


def _keys(method: str) -> list[tuple[str, ...]]:
    """Return a row for each key of a method: key, type, default, meaning."""
    schema = registry.get(method).Config.model_json_schema()
    return [
        (f"`{key}`", _type(value), _default(value, key, schema), value.get("description", ""))
        for key, value in schema.get("properties", {}).items()
    ]


def _key_table(rows: Iterable[tuple[str, ...]], *before: str) -> str:
    return _table((*before, "key", "type", "default", "meaning"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if parser.parse_args().check:
        wrong = differences()
        print("\n".join([*wrong, "run `make docs`"] if wrong else ["docs/reference is what the code says"]))
        sys.exit(bool(wrong))
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
