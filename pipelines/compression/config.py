"""Configuration of the compress stage: one variant, its method, and the method's own parameters in the same table.

A recipe writes `{method = "gptq", bits = 4, group_size = 32, samples = 128}`: keys of the engine are fields here, all
others go to the method's own `Config`, which validates them. The resolved parameters, defaults included, are identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from models.compression import registry
from models.compression.base import MethodConfig
from models.compression.formats.int_grid import GridConfig
from models.compression.training_method import TrainedConfig
from pipelines.core.settings import NOT_IDENTITY, Settings, known_keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CompressConfig(Settings):
    """One compressed variant of a model."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(
        "",
        description="Name of the variant in the graph; empty: made of the method and its parameters.",
        json_schema_extra=NOT_IDENTITY,
    )
    method: str = Field("rtn", description="How to compress; `ingot list compressors` shows the methods.")
    from_: str = Field(
        "",
        alias="from",
        description="Another variant to start from (prune, then quantize); empty: the pretrained model.",
        json_schema_extra=NOT_IDENTITY,  # the input's own fingerprint stands for it
    )
    samples: int = Field(64, ge=1, le=1_000_000, description="Training sequences shown to methods that calibrate.")
    seed: int = Field(0, ge=0, description="Seed of the choice of calibration sequences.")
    skip: tuple[str, ...] = Field(
        (), description="Layers to leave alone, as patterns on module names: '*.down_proj', 'model.layers.0.*'."
    )
    embeddings: Literal["keep", "bfloat16", "quantize"] = Field(
        "keep",
        description="Token matrices: as they are, in half the bytes, or rounded to the grid of the other layers.",
    )
    tolerance: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Perplexity on validation text may grow by so much (0.01: one percent); the most sensitive layers "
        "are left as they are until it does not grow by more. 0: every layer is compressed.",
    )
    baseline_documents: int = Field(
        12,
        ge=0,
        le=10_000,
        description="Validation documents on which the variant is compared with baselines at equal bytes; the first "
        "1024 tokens of each are scored; 0: no comparison.",
    )
    parameters: SerializeAsAny[MethodConfig] = Field(
        default_factory=MethodConfig, description="Parameters of the method; written flat, beside these keys."
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        """Move the keys that are not fields here into the method's own table, and validate them there."""
        if not isinstance(raw, Mapping):
            return raw
        keys = [field.alias or key for key, field in cls.model_fields.items() if key != "parameters"]
        own = {key: value for key, value in raw.items() if key in keys}
        method = own.get("method", cls.model_fields["method"].default)
        table = raw.get("parameters", {})
        flat = table.model_dump() if isinstance(table, MethodConfig) else dict(table)
        flat |= {key: value for key, value in raw.items() if key not in keys and key != "parameters"}
        return own | {"parameters": _parameters(str(method), flat, keys)}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.embeddings == "quantize" and not isinstance(self.parameters, GridConfig):
            raise ValueError(f"embeddings = 'quantize' needs a method with an integer grid; {self.method!r} has none")
        name = self.name or "-".join(part for part in (self.method, self.parameters.label) if part)
        if not _NAME.fullmatch(name):
            raise ValueError(f"name = {name!r} is used for folders and models: letters, digits, '.', '_', '-' only")
        if not self.name:
            object.__setattr__(self, "name", name)
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the method learns from the pretrained model beside the one that it starts from."""
        return isinstance(self.parameters, TrainedConfig) and self.parameters.needs_teacher

    @property
    def ranks_and_cores(self) -> tuple[int, int]:
        """Processes that train together, for a method that trains, and their cores: a rank has one thread."""
        ranks = self.parameters.world_size if isinstance(self.parameters, TrainedConfig) else 1
        return ranks, ranks

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a result, the method's resolved parameters beside them."""
        mine = super().identity()
        return mine.pop("parameters") | mine


def _parameters(method: str, table: dict[str, Any], fields: list[str]) -> MethodConfig:
    """Validate the method's parameters; errors carry the key as their place, so the whole path is shown."""
    try:
        known = registry.get(method).Config
    except ValueError as error:
        raise _refusal("method", method, str(error)) from None
    valid = [*known.model_fields, *fields]
    for key, value in table.items():
        if key not in known.model_fields:
            raise _refusal(key, value, f"not a key of method {method!r}{known_keys(key, valid)}")
    return known.model_validate(table)


def _refusal(key: str, value: Any, reason: str) -> ValidationError:
    detail = PydanticCustomError("compress", "{reason}", {"reason": reason})
    return ValidationError.from_exception_data(
        "CompressConfig", [InitErrorDetails(type=detail, loc=(key,), input=value)]
    )
