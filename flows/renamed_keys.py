"""Keys and values of recipes that have other names now. An old one is refused by naming the new one.

A position in a list is `*`. A key that one compression method has renamed while others still know it is written with
the method: `compress.*(optin).together`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.core.errors import ConfigError

KEYS: dict[str, str] = {
    "evaluate.latency": "evaluate.probes.latency",
    "compress.*.arms_documents": "compress.*.baseline_documents",
    "compress.*.refine": "compress.*.block_reconstruction",
    "compress.*.controls": "compress.*.baselines",
    "compress.*.start": "compress.*.init_from",
    "compress.*(hawq).together": "compress.*.tied_layers",
    "compress.*(optin).together": "compress.*.neurons_at_once",
    "prepare.max_contamination": "prepare.contamination.max_share",
    "promote.register_children": "promote.register_variants",
    "pretrain.from": "base.from",
    "pretrain.masking": "pretrain.objective_settings",
    "pretrain.spike": "pretrain.monitors.loss_spikes",
}
"""Old dotted path -> new dotted path."""

VALUES: dict[tuple[str, str], str] = {
    ("prepare.tokenizer", "start"): "init_weights",
    ("compress.*.init_from", "parent"): "base",
    ("pretrain.preset", "124m"): "90m",
    ("pretrain.preset", "350m"): "300m",
}
"""(dotted path, old value) -> new value."""


def refuse(table: dict[str, Any]) -> None:
    """Refuse a recipe that uses old names.

    Args:
        table: a recipe with everything that it extends and all overrides.

    Raises:
        ConfigError: every old name with its new one, one a line.
    """
    if lines := list(_renamed(table, "", "")):
        raise ConfigError("\n".join(lines))


def _renamed(node: Any, path: str, general: str) -> Iterator[str]:
    """Yield a line for each old name; `path` has numbers where `general`, the way to look it up, has `*`."""
    if isinstance(node, list):
        for position, element in enumerate(node):
            method = element.get("method", "") if isinstance(element, dict) else ""
            yield from _renamed(element, f"{path}.{position}", f"{general}.*({method})")
    elif isinstance(node, dict):
        for key, value in node.items():
            start = f"{path}." if path else ""
            yield from _renamed(value, f"{start}{key}", f"{general}.{key}" if general else key)
    elif isinstance(node, str) and (value := VALUES.get((_any_method(general), node))):
        yield f"{path} = {node!r} is called {value!r} now"
    new = KEYS.get(general) or KEYS.get(_any_method(general))
    if new is not None and general:
        yield f"{path} was renamed to {_with_positions(new, path)}"


def _any_method(general: str) -> str:
    """Return a path without the methods in it: `compress.*(optin).bits` -> `compress.*.bits`."""
    return ".".join("*" if part.startswith("*(") else part for part in general.split("."))


def _with_positions(new: str, old_path: str) -> str:
    positions = iter([part for part in old_path.split(".") if part.isdigit()])
    return ".".join(next(positions, "*") if part.startswith("*") else part for part in new.split("."))
