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
UNFIT = re.compile(r"[^\w\-. /:]")
"""What MLflow accepts in no key."""


def clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without secrets, as JSON values: what may be stored."""
    return {key: redact_value(key, value) for key, value in config.items()}


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key -> text for every leaf, secrets removed and texts cut to MLflow's limits.

    A text that is too long ends in the first digits of its sha256, so two different long values stay different.
    """
    return {
        _fit(UNFIT.sub("_", key), KEY_LIMIT): _fit(_text(value), VALUE_LIMIT) for key, value in _leaves(clean(config))
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        items: Iterator[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = ((_item_name(index, item), item) for index, item in enumerate(value))
    else:
        if path:
            yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else key)


def _item_name(index: int, item: Any) -> str:
    """Name a list item by its own `name`, which stays the same when the list is reordered."""
    name = item.get("name") if isinstance(item, Mapping) else None
    return name if isinstance(name, str) and name else str(index)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _fit(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    ending = ":" + hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]
    return text[: limit - len(ending)] + ending
