"""Personal data: addresses, numbers and keys that a model should not learn, replaced by their kind in brackets.

Patterns catch what has a form. Names and postal addresses have none, and stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

_PATTERNS: dict[str, re.Pattern[str]] = {
    "key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
        r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{22,}\b"
        r"|\bsk-[A-Za-z0-9_\-]{20,}\b|\bxox[baprs]-[A-Za-z0-9-]{10,}\b|\bAIza[0-9A-Za-z_\-]{35}\b"
        r"|\bhf_[A-Za-z0-9]{30,}\b|\beyJ[\w\-]{10,}\.eyJ[\w\-]{10,}\.[\w\-]{10,}",
        re.DOTALL,
    ),
    "email": re.compile(r"\b[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "card": re.compile(r"(?<![\w.\-])\d(?:[ \-]?\d){12,18}(?![\w\-])"),
    "ip": re.compile(
        r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)|(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{1,4}(?![\w:])"
    ),
    "phone": re.compile(
        r"(?<![\w.+\-/])(?:\+\d{1,3}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{1,4}(?:[ .\-]\d{2,8}){1,4}"
        r"|\+\d{9,14}|\(\d{3}\) ?\d{3}[ .\-]\d{4}|\d{3}[.\-]\d{3}[.\-]\d{4})(?![\w\-])"
    ),
}
"""In the order in which they are looked for."""
_HINTS = {"email": "@", "key": ("-----BEGIN", "AKIA", "ASIA", "gh", "sk-", "xox", "AIza", "hf_", "eyJ")}


def mask(text: str, kinds: Sequence[str]) -> tuple[str, Counter[str]]:
    """Return a text with the kinds masked, and how many of each were.

    Args:
        text: cleaned.
        kinds: of `prepare.mask`.
    """
    counts: Counter[str] = Counter()
    for kind, pattern in _PATTERNS.items():
        hints = _HINTS.get(kind, "")
        if kind in kinds and (
            not hints or any(hint in text for hint in ([hints] if isinstance(hints, str) else hints))
        ):
            text = pattern.sub(_replacement(kind, counts), text)
    return text, counts


def _replacement(kind: str, counts: Counter[str]) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        if not _CHECKS.get(kind, bool)(match[0]):
            return match[0]
        counts[kind] += 1
        return f"[{kind}]"

    return replace


def _is_card(number: str) -> bool:
    """Whether a number is of a card: its length, its first digit, and Luhn's sum."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = sum(sum(divmod(2 * d, 10)) if n % 2 else d for n, d in enumerate(reversed(digits)))
    return digits[0] in {2, 3, 4, 5, 6} and doubled % 10 == 0 and len(set(digits)) > 1


def _is_address(text: str) -> bool:
    """Whether a text is an address of a machine that others can reach; 127.0.0.1 and 192.168.0.1 name nobody."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return found.is_global


_CHECKS: dict[str, Callable[[str], bool]] = {"card": _is_card, "ip": _is_address}
