"""Configuration as MLflow parameters: flat, free of secrets, within MLflow's limits. Pure functions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.core.redaction import redact_value

KEY_LIMIT = 250
VALUE_LIMIT = 6000
_DIGEST_DIGITS = 12
_UNFIT = re.compile(r"[^\w\-. /:]")


def clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without secrets, as JSON values: what may be stored."""
    return {key: redact_value(key, value) for key, value in config.items()}


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key -> text for every leaf, secrets removed and texts cut to MLflow's limits.

    A text that is too long ends in the first digits of its sha256, so two different long values stay different.
    """
    return {
        _fit(_UNFIT.sub("_", key), KEY_LIMIT): _fit(_text(value), VALUE_LIMIT) for key, value in _leaves(clean(config))
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        items: Iterator[tuple[str, Any]] = ((str(key), child) for key, child in value.items())
    elif isinstance(value, list | tuple) and any(isinstance(child, Mapping) for child in value):
        items = ((_child_name(index, child), child) for index, child in enumerate(value))
    else:
        if path:
            yield path, value
        return
    for key, child in items:
        yield from _leaves(child, f"{path}.{key}" if path else key)


def _child_name(index: int, child: Any) -> str:
    """Name a list item by its own `name`, which stays the same when the list is reordered."""
    name = child.get("name") if isinstance(child, Mapping) else None
    return name if isinstance(name, str) and name else str(index)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _fit(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    ending = ":" + hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]
    return text[: limit - len(ending)] + ending
