"""One way to remove secrets from text and settings before they are shown, logged or stored anywhere.

A value is secret because of the name that it has (`aws_secret_access_key`), because of its shape (a password inside
a URL, a bearer token), or because an environment variable with such a name holds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"secret|passw(or)?d|passphrase|credential|api[_-]?key|access[_-]?key|private[_-]?key|signature|(^|[._-])auth($|[._-])"
    r"|(^|[._-])(?<!bos.)(?<!eos.)(?<!pad.)(?<!mask.)(?<!unk.)(?<!sep.)(?<!cls.)(?<!per.)(token|pat|sas|dsn)$|(auth|access|api|session|refresh|bearer|hf|hub|github|gitlab)_?token",
    re.IGNORECASE,
)
_SHAPES = (
    (re.compile(r"(?P<keep>[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/]+@"), rf"\g<keep>{HIDDEN}@"),
    (
        re.compile(
            r"(?P<keep>[?&;](?:[\w-]*(?:token|signature|secret|password|credential|api_?key|access_?key)|sig)=)[^&\s;#]+",
            re.IGNORECASE,
        ),
        rf"\g<keep>{HIDDEN}",
    ),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\g<keep>{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}"), HIDDEN),
)
_SHORTEST_SECRET = 6
"""A shorter value would also hide ordinary words."""


def is_secret_name(name: str) -> bool:
    """Return whether a setting or variable of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """Return `text` without passwords in URLs, tokens, keys, and the values of secret environment variables."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def redact_value(name: str, value: Any) -> Any:
    """Return a setting's value as it may be shown: hidden when its name says so, cleaned at every depth."""
    if isinstance(value, Mapping):
        return {key: redact_value(str(key), child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(name, child) for child in value]
    if value is not None and not isinstance(value, bool) and is_secret_name(name):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def redact_override(override: str) -> str:
    """Return a `dotted.path=value` as it may be shown: its value is hidden when the last part of its path says so."""
    path, equals, value = override.partition("=")
    return f"{path}{equals}{redact_value(path.rpartition('.')[2], value)}"


def _secrets_of_environment() -> list[str]:
    """Return secret values, longest first: one may be a part of another."""
    secrets = {v for k, v in os.environ.items() if is_secret_name(k) and len(v) >= _SHORTEST_SECRET}
    return sorted(secrets, key=len, reverse=True)
