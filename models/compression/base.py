"""The contract of compression methods, and the one error measure that all of them are compared by.

A method is one module in this package; its file name is its registry name. It defines

    kind            "weight", "structure", "kv_cache" or "training"
    bits            what it can store a weight in, for tables: "2-8"
    calibration     what it must be shown: "none", "hessian" (the input second moment of each layer), "inputs" (that,
                    and a sample of the inputs themselves) or "gradients" (that, and squared weight gradients)
    paper           where it comes from
    Config          its parameters, a `MethodConfig`

and, for kind "weight", the pure functions of `WeightMethod`. A module without `kind` is a helper, not a method.

Shapes: O output features, I input features, G groups along I, S weights in a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

Kind = Literal["weight", "structure", "kv_cache", "training"]
Calibration = Literal["none", "hessian", "inputs", "gradients"]


class MethodConfig(BaseModel):
    """Base of every method's parameters: frozen, complete, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @property
    def label(self) -> str:
        """Short text for names of children, for instance `int4-g32`; letters, digits and dashes only."""
        return ""

    def fitted(self, columns: Collection[int]) -> Self:  # noqa: ARG002 - methods with groups use it
        """Return the parameters under which layers of all these widths share one storage scheme."""
        return self

    @property
    def block_steps(self) -> int:
        """Steps of block-wise optimisation that the driver makes with the layers of each block, once compressed."""
        return 0

    def for_layer(self, name: str) -> Self:  # noqa: ARG002 - methods that treat layers differently use it
        """Return the parameters for the layer of this name."""
        return self


@dataclass(frozen=True)
class Statistics:
    """What calibration saw at the input of one layer."""

    hessian_II: Tensor | None = None
    """X^T X over all calibration tokens, float32 or float64; None where nothing was measured."""
    tokens: int = 0
    """Number of rows of X."""
    inputs_NI: Tensor | None = None
    """A sample of rows of X, float32, as they arrive behind the blocks already compressed; None unless asked for."""
    reference_NI: Tensor | None = None
    """The same rows in the original model."""
    fisher_OI: Tensor | None = None
    """Sum over calibration sequences of the squared gradient of the summed loss; None unless asked for."""
    curvature: float | None = None
    """Mean second derivative of the mean loss along the weights of the layer; only shown to planning."""

    def rows(self, method: str, columns: int) -> Tensor:
        """Return `inputs_NI`, which `second_moment` must allow too.

        Raises:
            ValueError: it is missing, empty, or not of `columns` features.
        """
        self.second_moment(method, columns)
        if self.inputs_NI is None or not len(self.inputs_NI):
            raise ValueError(f"{method} needs calibration: statistics.inputs_NI is {self.inputs_NI}")
        if self.inputs_NI.shape[1] != columns:
            raise ValueError(f"{method}: inputs_NI has {self.inputs_NI.shape[1]} features; the layer has {columns}")
        return self.inputs_NI

    def second_moment(self, method: str, columns: int) -> Tensor:
        """Return `hessian_II` as float64.

        Raises:
            ValueError: it is missing, not finite, or not of `columns` x `columns`.
        """
        if self.hessian_II is None:
            raise ValueError(f"{method} needs calibration: statistics.hessian_II is None")
        if self.hessian_II.shape != (columns, columns):
            found = tuple(self.hessian_II.shape)
            raise ValueError(f"{method}: hessian_II has shape {found}; the layer has {columns} input features")
        if not bool(torch.isfinite(self.hessian_II).all()):
            raise ValueError(f"{method}: hessian_II holds non-finite values; the calibration activations overflowed")
        return self.hessian_II.double()


class Packed(ABC):
    """One compressed weight matrix: what is stored, and what it stands for."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight [O, I] that the stored tensors stand for, float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is stored: codes, scales, masks, zero points, shape."""

    def stored_bits(self) -> int:
        """Return the size of all that is stored, in bits."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    def scheme(self) -> dict[str, Any] | None:
        """Return the `weights` entry of a compressed-tensors config group; None where no public layout fits."""
        return None

    def input_scheme(self) -> dict[str, Any] | None:
        """Return the `input_activations` entry of that group; None where inputs are not rounded."""
        return None

    @property
    def storage(self) -> str:
        """Return the compressed-tensors format of `tensors()`, which counts where `scheme` is not None."""
        return "pack-quantized"

    def widened(self) -> Packed:
        """Return the same weight with float32 scales, for readers that compute in the dtype of the scales."""
        return self

    def inputs(self, x: Tensor) -> Tensor:
        """Return x [..., I] as the product reads it: rounded, where the layer rounds its inputs."""
        return x

    @property
    def rounds_inputs(self) -> bool:
        """Whether `inputs` does anything."""
        return type(self).inputs is not Packed.inputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the packed layer to x [..., I]; returns [..., O] in the dtype of x."""
        return self.product(x, self.dequantize().to(x.dtype))

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Apply the layer to x [..., I] with its unpacked weight at hand, in the dtype of x."""
        return torch.nn.functional.linear(self.inputs(x), weight_OI, bias_O)


class WeightMethod(Protocol):
    """A method module of kind "weight"."""

    kind: Kind
    bits: str
    calibration: Calibration
    paper: str
    Config: type[MethodConfig]
    not_informative: str
    """Why the comparison with a naive baseline says nothing; empty where it does."""

    def compress(self, weight_OI: Tensor, statistics: Statistics, config: Any) -> Packed:
        """Return the compressed weight."""

    def restore(self, tensors: Mapping[str, Tensor], config: Any) -> Packed:
        """Rebuild a `Packed` from its `tensors()`."""

    def nulls(self, weight_OI: Tensor, statistics: Statistics, config: Any) -> dict[str, Packed]:
        """Return the null arms: naive choices at the same stored bits, by name."""


def relative_error(weight_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor | None = None) -> float:
    """Return ||X (W - W')^T||^2 / ||X W^T||^2, or ||W - W'||^2 / ||W||^2 without a Hessian.

    Args:
        weight_OI: the original weight.
        approximation_OI: what replaced it.
        hessian_II: X^T X.
    """
    exact_OI = weight_OI.double()
    return _energy(exact_OI - approximation_OI, hessian_II) / max(_energy(exact_OI, hessian_II), 1e-300)


def _energy(matrix_OI: Tensor, hessian_II: Tensor | None) -> float:
    weighted_OI = matrix_OI if hessian_II is None else matrix_OI @ hessian_II.double()
    return float(torch.dot(weighted_OI.flatten(), matrix_OI.flatten()))
