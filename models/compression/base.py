"""The interface of compression methods, and the one error measure that all of them are compared by.

A method is one module in this package that defines a class `Method`; its file name is its registry name. The class
extends the one of its kind:

    weight       `WeightMethod`, here             one matrix after another, each stored packed
    training     `training_method.TrainingMethod` a model that is trained in compressed form
    structure    `structure_method.StructureMethod`   heads and neurons that go
    kv_cache     `cache_method.CacheMethod`       keys and values of the attention cache
    search       `search.Method` alone            tries the others

A module without a class `Method` is a helper. Pure tensor functions come first in a file, the class after them.

Shapes: O output features, I input features, G groups along I, S weights in a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from models.closed import Closed
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

Kind = Literal["weight", "structure", "kv_cache", "training", "search"]
Calibration = Literal["none", "hessian", "inputs", "gradients"]
SensitivitySource = Literal["curvature", "gradients", "hessian"]


class MethodConfig(Closed):
    """Base of every method's parameters: frozen, complete, and closed to unknown names."""

    @property
    def label(self) -> str:
        """Short text for names of variants, for instance `int4-g32`; letters, digits and dashes only."""
        return ""

    def fitted(self, columns: Collection[int]) -> Self:  # noqa: ARG002 - methods with groups use it
        """Return the parameters under which layers of all these widths share one storage scheme."""
        return self

    @property
    def block_steps(self) -> int:
        """Steps of block reconstruction that follow once the layers of a block are compressed."""
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
    highest_I: Tensor | None = None
    """Largest magnitude of each input feature over all calibration tokens, float32: a sample of rows misses it."""
    fisher_OI: Tensor | None = None
    """Sum over calibration sequences of the squared gradient of the summed loss; None unless asked for."""
    curvature: float | None = None
    """Mean second derivative of the mean loss along the weights of the layer; only given for the allocation of bits."""

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

    def largest(self, method: str, columns: int) -> Tensor:
        """Return the largest magnitude of each feature [I] over all calibration tokens, or over `rows` without it.

        Raises:
            ValueError: as `rows` does.
        """
        rows_NI = self.rows(method, columns)
        return rows_NI.abs().amax(0) if self.highest_I is None else self.highest_I

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


C = TypeVar("C", bound=MethodConfig)


class CompressionMethod(ABC, Generic[C]):
    """What every method says of itself; `C` is its own `Config`."""

    kind: ClassVar[Kind]
    bits: ClassVar[str]
    """What it can store a number in, for tables: "2-8"."""
    calibration: ClassVar[Calibration]
    """What it must be shown: nothing; the second moment of each layer's input (hessian); that and a sample of the
    inputs themselves; or that and squared weight gradients."""
    paper: ClassVar[str]
    """Where it comes from."""
    not_informative: ClassVar[str] = ""
    """Why a comparison with a naive baseline says nothing; empty where it does."""
    Config: type[C]
    """Its parameters; given as `class Method(WeightMethod[Config], config=Config)`."""

    def __init_subclass__(cls, config: type[C] | None = None) -> None:
        super().__init_subclass__()
        if config is not None:
            cls.Config = config

    @property
    def name(self) -> str:
        """The registry name: that of the module."""
        return type(self).__module__.rpartition(".")[2]


class PackingMethod(CompressionMethod[C]):
    """A method whose layers may be stored packed."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], config: C) -> Packed:
        """Rebuild a packed weight from its `Packed.tensors()`."""


@dataclass(frozen=True)
class Needs:
    """What one configuration of a weight method must be shown of the calibration sequences."""

    sequences: bool = False
    """The sequences at all: second moments of all inputs."""
    inputs: bool = False
    """A sample of the inputs of each layer, behind the compressed blocks and in the original model."""
    gradients: bool = False
    """Squared gradients of every weight."""


@dataclass(frozen=True)
class BitAllocation(Generic[C]):
    """What may be shared out among layers, and under which budget."""

    options: Sequence[C]
    """The parameters that a layer may be given."""
    budget: float
    """Stored bits a weight over all layers, whatever is stored beside the codes included."""
    sensitivity_source: SensitivitySource
    """Which statistics `WeightMethod.cost` predicts losses from."""
    probes: int = 1
    """Random directions a batch where the source is curvature."""
    operations_budget: float = 0.0
    """Bit operations of a multiplication, the mean over all layers; 0: no such budget."""
    tied_layers: Sequence[str] = ()
    """Patterns on module names; layers that match one of them get the same option."""


@dataclass(frozen=True)
class Cost:
    """What one layer would cost under one option."""

    stored_bits: int
    loss: float
    """Predicted increase; comparable between layers."""
    operations: int = 0
    """Bit operations of a token: for each multiplication the width of the weight times that of the input."""


class WeightMethod(PackingMethod[C]):
    """A method that compresses one weight matrix after another.

    `compress` and `restore` are all that a method must have. Everything else has a default that asks for nothing.
    """

    kind: ClassVar[Kind] = "weight"

    @abstractmethod
    def compress(self, weight_OI: Tensor, statistics: Statistics, config: C) -> Packed:
        """Return the compressed weight, on the device of `weight_OI`.

        Raises:
            ValueError: statistics that the method needs are missing or unusable, or the layer does not fit it.
        """

    def baselines(self, weight_OI: Tensor, statistics: Statistics, config: C) -> dict[str, Packed]:  # noqa: ARG002
        """Return naive choices at the same stored bits, by name; none where `not_informative` says why."""
        return {}

    def candidates(self, config: C) -> Sequence[C]:
        """Return the configurations of which the best on validation text is taken; one: there is nothing to choose."""
        return [config]

    def allocation(self, config: C) -> BitAllocation[C] | None:  # noqa: ARG002
        """Return what is shared out among the layers under a budget; None: every layer gets `config`."""
        return None

    def cost(self, weight_OI: Tensor, statistics: Statistics, option: C) -> Cost:
        """Return size and predicted loss of one layer under one option of `allocation`."""
        raise NotImplementedError(f"{self.name} shares nothing out among layers")

    def needs(self, config: C) -> Needs:
        """Return what calibration must measure for `compress`, `baselines` and `cost`."""
        allocation = self.allocation(config)
        return Needs(
            sequences=self.calibration != "none" or config.block_steps > 0,
            inputs=self.calibration == "inputs",
            gradients=self.calibration == "gradients"
            or (allocation is not None and allocation.sensitivity_source == "gradients"),
        )


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
