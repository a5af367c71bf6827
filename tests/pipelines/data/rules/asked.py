"""What a rule says of a text, for the tests of all rules."""

from __future__ import annotations

from pipelines.data.rules import registry
from pipelines.data.rules.base import Page
from pipelines.data.shingles import units_of


def reason_of(name: str, text: str) -> str | None:
    """Return why a rule with its default settings drops an English text; None where it keeps it."""
    (rule,) = registry.make((registry.settings({"name": name}, "0", None),))
    return rule.reason(Page(text, units_of(text)))
