"""What a model writes: a decoder's continuations of fixed prompts, an encoder's words for the masks in them.

Numbers compare models; whoever chooses one also wants to read it. Prompts, seed and settings are fixed, so the texts of
a variant and of its base model can be read side by side. They are kept as samples.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from models.architectures.config import Family
from pipelines.evaluation.probe import Measurement, Probe, ProbeSettings, Subject
from pipelines.measure.config import SamplingSettings

if TYPE_CHECKING:
    from pipelines.measure.openings import Opening
    from pipelines.measure.prompts import Prompter

_WORDS = 5
"""Guesses that are kept for a mask."""


class SamplesSettings(SamplingSettings, ProbeSettings):
    """Which prompts, and how their continuations are drawn."""

    prompts: tuple[str, ...] = Field(
        default=(),
        description="Texts to continue; for an encoder with [MASK] or ___. None: first words of held-out documents.",
    )
    documents: int | None = Field(
        default=None, ge=1, le=100, description="How many held-out documents give their first words. None: 3."
    )
    new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that a decoder writes at most. None: 64, or as many as there is room for.",
    )

    @model_validator(mode="after")
    def _prompts_come_from_one_place(self) -> Self:
        if self.prompts and self.documents is not None:
            raise ValueError(f"documents = {self.documents} does nothing beside prompts: they take its place")
        return self


class Samples(Probe[SamplesSettings]):
    """Texts at fixed prompts."""

    families = frozenset({"decoder", "encoder"})
    Settings = SamplesSettings

    def misfit(self, settings: SamplesSettings, family: Family) -> str | None:
        """Return which setting does nothing or cannot work for the models of a run; None where all fit."""
        if family == "decoder":
            return None
        fields = {**SamplingSettings.model_fields, "new_tokens": SamplesSettings.model_fields["new_tokens"]}
        idle = [name for name, field in fields.items() if getattr(settings, name) != field.default]
        if idle:
            return f"{', '.join(idle)} does nothing: an encoder fills in words, it draws none"
        from pipelines.measure.openings import MASKS

        without = [prompt for prompt in settings.prompts if not MASKS.search(prompt)]
        return f"prompts: an encoder needs [MASK] or ___ in each; {without[0]!r} has none" if without else None

    def refusal(self, subject: Subject) -> str | None:
        """Return why this model cannot be measured; None where it can."""
        from pipelines.measure.heldout import TOKENIZER

        missing = None if (subject.folder / TOKENIZER).is_file() else f"{subject.folder} has no {TOKENIZER}"
        return super().refusal(subject) or missing

    def _measure(self, subject: Subject, settings: SamplesSettings) -> Measurement:
        from pipelines.measure import openings
        from pipelines.measure.openings import Opening
        from pipelines.measure.prompts import Prompter

        prompter, family = Prompter(subject.scorer, subject.folder), subject.scorer.family
        chosen = [Opening(text) for text in settings.prompts] or openings.of(
            subject.documents.documents,
            prompter.tokenizer,
            family,
            count=settings.documents or openings.COUNT,
            positions=prompter.positions,
        )
        ask = self._continuation if family == "decoder" else self._words
        rows = [ask(prompter, opening, settings) for opening in chosen]
        return Measurement(result={"prompts": len(rows)}, rows=rows)

    def _continuation(self, prompter: Prompter, opening: Opening, settings: SamplesSettings) -> dict[str, Any]:
        return {"prompt": opening.text, "text": prompter.continuation(opening.text, settings, settings.new_tokens)}

    def _words(self, prompter: Prompter, opening: Opening, settings: SamplesSettings) -> dict[str, Any]:  # noqa: ARG002 - nothing is drawn
        masks = [[vars(word) for word in words] for words in prompter.masked(opening.text, _WORDS)]
        return {"prompt": opening.text, "masks": masks} | ({"answer": opening.answer} if opening.answer else {})
