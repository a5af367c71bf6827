"""What every rule supplies.

A module of this package defines one class `Rule(base.Rule)`; its file name is the `name` of a table in `prepare.rules`.
A rule is a pure function of a cleaned text and its settings, so that the number of workers changes nothing.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pipelines.core.settings import Settings
from pipelines.data.shingles import Units

_POLICIES = (
    "cookie", "privacy policy", "terms of use", "terms of service", "all rights reserved", "alle rechte vorbehalten",
    "datenschutz", "tous droits r\u00e9serv\u00e9s", "mentions l\u00e9gales", "todos los derechos reservados",
    "pol\u00edtica de privacidad", "tutti i diritti riservati", "todos os direitos reservados",
)  # fmt: skip


class RuleConfig(Settings):
    """The settings that every rule has."""

    name: str = Field(description="Which rule: a module of pipelines/data/rules.")
    sources: tuple[str, ...] = Field(
        (), description="Patterns of the sources that it is for, as `web-*`; none: every source."
    )

    @classmethod
    def placed(cls, table: dict[str, Any], start: Path | None) -> dict[str, Any]:  # noqa: ARG003
        """Return a table whose paths are absolute; a rule with files overrides it.

        Args:
            table: as the recipe has it.
            start: where relative paths start.
        """
        return table


class Page:
    """A cleaned text and what several rules ask of it.

    Args:
        text: cleaned.
        units: of its normal form.
    """

    def __init__(self, text: str, units: Units) -> None:
        self.text = text
        self.units = units

    @cached_property
    def lines(self) -> list[str]:
        """Lines without blanks around them; blank ones are left out."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def words(self) -> list[str]:
        """What stands between blanks."""
        return self.text.split()

    @cached_property
    def policy_lines(self) -> int:
        """Number of lines that speak of cookies, policies or rights."""
        return sum(any(mark in line.lower() for mark in _POLICIES) for line in self.lines)

    @property
    def spaced(self) -> bool:
        """Whether most of it is in scripts that put spaces between words."""
        quarters = self.units.quarters
        return quarters is None or 2 * int((quarters < 4).sum()) < len(quarters)


class Rule(ABC):
    """Decides about documents.

    Args:
        settings: an instance of the class's `Config`.
        learned: file of what it has learned, for a rule that learns.
    """

    Config: ClassVar[type[RuleConfig]] = RuleConfig
    """Schema of its table."""
    learns: ClassVar[bool] = False
    """Whether `fit` must be called once before `reason`."""

    def __init__(self, settings: Any, learned: Path | None = None) -> None:
        self.settings = settings
        self.learned = learned

    def concerns(self, source: str) -> bool:
        """Return whether it is for documents of a source."""
        patterns = self.settings.sources
        return not patterns or any(fnmatch.fnmatchcase(source, pattern) for pattern in patterns)

    @abstractmethod
    def reason(self, page: Page) -> str | None:
        """Return why a document is dropped, in a few words that the report counts by, or None."""

    def fit(self, texts: Iterable[str]) -> None:
        """Learn from texts of the corpus and write `learned`; called in one process before any `reason`."""
        raise NotImplementedError(f"{type(self).__module__} learns nothing")
