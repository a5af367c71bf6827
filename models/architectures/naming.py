"""What a parameter's name says about its place in the model; one rule for every family."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GROUPS = (
    ("embedding", re.compile(r"(?:^|\.)(?:embed_tokens|tok_embeddings)\.")),
    ("head", re.compile(r"(?:^|\.)(?:lm_head|head|decoder)\.")),
)


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a parameter belongs to; None for embeddings, final norm and head."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def group_of(name: str) -> str:
    """Return the group that a parameter is reported under: `layer.<n>`, `embedding`, `head` or `norm`."""
    layer = layer_of(name)
    if layer is not None:
        return f"layer.{layer}"
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "norm")
