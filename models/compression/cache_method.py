"""The interface of methods that quantize the keys and values of the attention cache; weights stay as they are.

Shapes: N rows (tokens of all sequences), C channels (all key heads side by side).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from pydantic import Field

from models.compression.base import CompressionMethod, Kind, MethodConfig

if TYPE_CHECKING:
    from torch import Tensor

    from models.compression.formats.cache_codes import Quantizer


class CacheConfig(MethodConfig):
    """Parameters that every cache has."""

    exact_tokens: int = Field(1, ge=0, le=1024, description="tokens at the start of a sequence kept in float16")


Q = TypeVar("Q", bound=CacheConfig)


@dataclass(frozen=True)
class CacheBaseline(Generic[Q]):
    """A plainer way to quantize the same cache."""

    config: Q
    after_rope: bool = False
    """Whether keys are quantized after their rotation; then the quantizer is fitted on such keys."""


class CacheMethod(CompressionMethod[Q]):
    """A method that fits one quantizer for the keys and one for the values of each layer."""

    kind: ClassVar[Kind] = "kv_cache"

    @abstractmethod
    def fit_keys(self, x_NC: Tensor, fisher_NC: Tensor, config: Q) -> Quantizer:
        """Return the quantizer of one layer's keys.

        Args:
            x_NC: keys before RoPE over the calibration tokens.
            fisher_NC: squared gradient of the summed loss with respect to each of them.
            config: parameters.

        Raises:
            ValueError: entries that are not finite, or channels that do not fill whole bytes.
        """

    @abstractmethod
    def fit_values(self, x_NC: Tensor, fisher_NC: Tensor, config: Q) -> Quantizer:
        """Return the quantizer of one layer's values; arguments as in `fit_keys`."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], config: Q) -> Quantizer:
        """Rebuild a quantizer from its `tensors()`."""

    @abstractmethod
    def baselines(self, config: Q) -> dict[str, CacheBaseline[Q]]:
        """Return plainer ways with the same bits, without those that are the configuration itself."""
