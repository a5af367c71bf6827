"""Search: the smallest variant within a stated quality budget, found by trying other methods at several widths.

It stores nothing itself: `pipelines.compression.budget_search` compresses with the methods named here and keeps
the winner.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Self

from pydantic import Field, model_validator

from models.compression import registry
from models.compression.base import Calibration, CompressionMethod, Kind, MethodConfig


class Config(MethodConfig):
    """What is tried, and what the variant may cost."""

    methods: tuple[str, ...] = Field(("rtn", "gptq"), min_length=1, description="methods with `bits` and `group_size`")
    bits: tuple[int, ...] = Field((2, 3, 4, 8), min_length=1, description="widths that each method may use")
    group_sizes: tuple[int, ...] = Field((0, 64), min_length=1, description="group sizes to try; 0: the whole row")
    max_bits_per_byte_ratio: float = Field(
        1.01, gt=1.0, description="upper end of the variant's validation loss over the base's"
    )
    max_kl_nats: float | None = Field(
        None, gt=0.0, description="largest mean KL divergence from the base, nats per token; unset: unbounded"
    )
    sequences: int = Field(256, ge=8, le=1_000_000, description="validation sequences that candidates are measured on")

    @property
    def label(self) -> str:
        """For instance `1.01`: the budget."""
        return f"{self.max_bits_per_byte_ratio:g}"

    @model_validator(mode="after")
    def _candidates_exist(self) -> Self:
        for method, width, size in product(self.methods, self.bits, self.group_sizes):
            known = registry.weight(method).Config
            if not {"bits", "group_size"} <= set(known.model_fields):
                raise ValueError(f"methods: {method!r} has no `bits` and `group_size` to search over")
            known.model_validate({"bits": width, "group_size": size})
        return self


class Method(CompressionMethod[Config], config=Config):
    """The entry of `method = "search"` in the registry."""

    kind: ClassVar[Kind] = "search"
    bits: ClassVar[str] = "as its methods"
    calibration: ClassVar[Calibration] = "none"
    paper: ClassVar[str] = "none: bisection over the widths of other methods"
    not_informative: ClassVar[str] = "it chooses among methods that have baselines themselves"
