"""What a compression says of itself: one schema, filled by every driver and read by report, registry and deploy.

It is written as `compression.json` beside the variant's `model/`. Sizes are bytes unless a name says bits; errors are
relative squared errors; nothing here depends on the name that a recipe gives the variant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.core import artifact
from pipelines.core.errors import IntegrityError
from pipelines.measure.intervals import Interval

FILE = "compression.json"
FORMAT: Literal[1] = 1


class Part(BaseModel):
    """Base of all parts: frozen, and closed to keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationFacts(Part):
    """The training sequences that the method was shown."""

    sequences: int
    seed: int


class TrainingFacts(Part):
    """How long a method of kind "training" trained."""

    steps: int
    seed: int


class Totals(Part):
    """Sizes of the variant beside those of its base; None where a kind of method has no such number."""

    layers: int
    bytes: int
    """All files that hold weights, and the cache tables."""
    base_bytes: int
    ratio: float
    """`base_bytes` over `bytes`."""
    bits_per_weight: float | None = None
    """Of the compressed layers alone."""
    model_bits_per_weight: float | None = None
    """All of `bytes`, embeddings and norms included, for each weight of the whole base model."""
    weights: int | None = None
    """Weights of the compressed layers; of the whole model where units were cut out."""
    base_weights: int | None = None
    stored_bits: int | None = None
    layer_bytes: int | None = None
    """Of the compressed layers alone."""
    base_layer_bytes: int | None = None
    layer_ratio: float | None = None
    embedding_bytes: int | None = None
    bits_per_cached_number: float | None = None
    table_bytes: int | None = None
    """Of the tables that say how an attention cache is quantized."""


class Reconstruction(Part):
    """How learning the layers of a block together went, on calibration sequences that it was not learned from."""

    before: float
    """||f(x) - y||^2 / ||y||^2 of the block's outputs."""
    after: float
    kept: bool
    """Whether the learned layers are what is stored: only where the error fell."""


class PackedLayer(Part):
    """One layer whose weights were compressed."""

    shape: tuple[int, int]
    stored_bits: int
    bits_per_weight: float
    weight_error: float | None = None
    """||W - W'||^2 / ||W||^2; None where the layer has another shape than the base's."""
    output_error: float | None = None
    """||X (W - W')^T||^2 / ||X W^T||^2 on the calibration tokens; None without calibration."""
    baselines: dict[str, float] = Field(default_factory=dict)
    """The same error of the method's baselines, which store as many bits."""
    reconstruction: Reconstruction | None = None
    """Of the block that the layer is in; None where no block was learned."""


class CutLayer(Part):
    """One block whose units were cut out: which attention groups stay, and which neurons go."""

    groups: list[int]
    neurons_removed: list[int]


class CacheErrors(Part):
    """Errors of quantized keys and values, weighted by squared gradients."""

    keys: float
    values: float


class CachedLayer(CacheErrors):
    """One layer whose attention cache is quantized."""

    baselines: dict[str, CacheErrors] = Field(default_factory=dict)


class WeightErrors(Part):
    """Means over the layers that have such an error."""

    weight: float | None = None
    output: float | None = None
    baselines: dict[str, float] = Field(default_factory=dict)


class Measurement(Part):
    """One model on the text of a comparison, with intervals over its items."""

    ratio: Interval
    """Its loss over that of the base: bits per byte, a ratio in which bytes and ln 2 cancel."""
    versus_variant: Interval
    """Its loss over that of the variant."""
    nats_per_token: Interval
    perplexity_ratio: Interval
    """Its perplexity over that of the base."""
    bytes: int | None = None
    """Of the compressed layers."""
    cache_bytes_per_token: float | None = None
    """Of an attention cache; where this is given it is what baselines are matched by."""


class Comparison(Part):
    """The variant beside baselines of its size (bytes of layers or of a cache), on one text."""

    split: Literal["validation", "train"]
    unit: Literal["documents", "sequences"]
    items: int
    """Number of `unit`s, which intervals are over."""
    scored_tokens: int
    base_nats_per_token: Interval
    variant: Measurement
    baselines: dict[str, Measurement] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Baselines of other kinds that say nothing here -> why."""


class Partial(Part):
    """Layers that were left alone because the loss would have grown beyond the tolerance."""

    kept: list[str]
    sensitivity: dict[str, float]
    """Perplexity over the base's with that layer alone compressed."""
    ratio: float
    """Perplexity over the base's with all layers but `kept` compressed."""
    ratio_of_all: float


class Allocation(Part):
    """Bits shared out among layers, and the predicted loss beside that of other allocations within the budget."""

    budget_bits: int
    stored_bits: int
    budget_operations: int | None = None
    operations: int | None = None
    """Bit operations of a token in the layers; None without a second budget."""
    predicted: float
    random: list[float]
    uniform: float | None = None
    layers: dict[str, dict[str, Any]]
    """Layer -> its parameters."""


class Trial(Part):
    """One candidate of a search, as it was measured on validation sequences."""

    method: str
    bits: int
    group_size: int
    bytes: int
    """Weight files on disk."""
    ratio: Interval
    """Loss over the base's, paired over sequences."""
    kl_nats: float
    """Mean divergence of the candidate's predictions from the base's, nats per token."""

    def __str__(self) -> str:
        place = f"groups of {self.group_size}" if self.group_size else "a row"
        return (
            f"{self.method} {self.bits} bit, {place}: {self.bytes} bytes, loss ratio {self.ratio.value:.4f}, "
            f"upper end {self.ratio.high:.4f}, KL {self.kl_nats:.4f}"
        )


class Budget(Part):
    """What the winner of a search may cost."""

    max_bits_per_byte_ratio: float
    max_kl_nats: float | None = None


class SearchFacts(Part):
    """What a search tried, and what it chose."""

    budget: Budget
    sequences: int
    chosen: Trial
    trials: list[Trial]


class CompressionReport(Part):
    """`compression.json`."""

    format: Literal[1] = FORMAT
    method: str
    parameters: dict[str, Any]
    """As they were used, defaults included."""
    layout: str
    """How the weights are stored: "safetensors", "compressed-tensors", "ingot packed", ..."""
    loads_with: Literal["transformers", "pipelines.modelio.load"]
    not_informative: str = ""
    """Why a comparison with the method's own baselines says nothing; empty where it does."""
    calibration: CalibrationFacts | None = None
    training: TrainingFacts | None = None
    totals: Totals
    errors: WeightErrors | CachedLayer | None = None
    layers: dict[str, PackedLayer | CutLayer | CachedLayer]
    candidates: dict[str, float] | None = None
    """Loss in nats a token of each candidate that the method put forward, by label; the least was taken."""
    partial: Partial | None = None
    allocation: Allocation | None = None
    search: SearchFacts | None = None
    comparison: Comparison | None = None
    """None where there was no text to compare on, or none was wanted."""

    def write(self, out_dir: Path) -> None:
        """Write `compression.json` into a folder, whole or not at all: equal reports give equal bytes."""
        artifact.write_text(out_dir / FILE, json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, without what does not apply."""
        return self.model_dump(mode="json", exclude_none=True)

    def summary(self) -> dict[str, Any]:
        """Return what the artifact's manifest tells: everything but the rows of layers and of trials."""
        told = {"method", "parameters", "layout", "totals", "errors", "comparison"}
        search = {"search": self.search.model_dump(mode="json", include={"budget", "chosen"})} if self.search else {}
        return self.model_dump(mode="json", include=told, exclude_none=True) | search

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the report of a compress artifact.

        Args:
            folder: folder of the artifact.

        Raises:
            IntegrityError: there is none, it is damaged, or another version of Ingot wrote it.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}", hint="delete the artifact and run again") from error
        written = content.get("format") if isinstance(content, dict) else None
        if written != FORMAT:
            raise IntegrityError(
                f"{path} has format {written}; this checkout reads {FORMAT}", hint="run the compression again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise IntegrityError(
                f"{path} is damaged: {place}: {first['msg']}", hint="delete the artifact and run again"
            ) from error
