"""The JSON schema of a recipe, for editors: what TOML may hold, the keys of each compression method among it."""

from __future__ import annotations

from typing import Any

from flows.config import RunConfig
from models.closed import UNSET
from models.compression import registry
from pipelines.compression.config import CompressConfig

Schema = dict[str, Any]


def schema() -> Schema:
    """Return the schema of a recipe (draft 2020-12)."""
    made: Schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()
    made["title"] = "Recipe of Ingot"
    extends = {"type": "string", "description": "The recipe that this one changes: its name, or the path of its file."}
    made["properties"] = {"extends": extends} | made["properties"]
    _say_none(made)
    variant = made["$defs"][CompressConfig.__name__]
    del variant["properties"]["parameters"], variant["additionalProperties"]  # the keys of a method are written flat
    variant["properties"]["method"]["enum"] = registry.names()
    variant["allOf"] = [_with_keys_of(method, variant, made["$defs"]) for method in registry.names()]
    return made


def _say_none(node: Any) -> None:
    """Let the word `none` stand where a key may be unset: TOML has no null."""
    if isinstance(node, list):
        for child in node:
            _say_none(child)
    elif isinstance(node, dict):
        if node.get("type") == "null":
            del node["type"]
            node["enum"] = [UNSET[0]]
        for child in node.values():
            _say_none(child)


def _with_keys_of(method: str, variant: Schema, definitions: Schema) -> Schema:
    """Return the rule that a table with this method has its keys beside those of every variant, and no others."""
    own = registry.get(method).Config.model_json_schema()
    _say_none(own)
    definitions |= own.get("$defs", {})
    keys = own.get("properties", {})
    named: Schema = {"properties": {"method": {"const": method}}}
    if method != CompressConfig.model_fields["method"].default:
        named["required"] = ["method"]
    return {"if": named, "then": {"properties": keys, "propertyNames": {"enum": [*variant["properties"], *keys]}}}
