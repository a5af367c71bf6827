"""What methods that train have in common: how they train, and the interface of such a method.

They train on the engine of the pretrain stage: parameters that a method adds to the model are ordinary named
parameters, so ZeRO shards them, checkpoints hold them, LISA freezes them with their layer, and tensors with one axis
(learned scales) are excluded from weight decay and trust ratios. Everything that is not a parameter must follow from
the initial weights alone, because an interrupted run is put together anew from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from models.architectures.config import Shape
from models.compression.base import Calibration, Kind, MethodConfig, Packed, PackingMethod
from models.optim import batch_split

if TYPE_CHECKING:
    from torch import Tensor, nn

_ELASTIC: dict[str, Any] = {"elastic": True}
_NOT_IDENTITY: dict[str, Any] = {"identity": False}


class TrainedConfig(MethodConfig):
    """How a compressed model is trained."""

    steps: int = Field(200, ge=0, description="optimizer steps; 0 compresses the base as it is")
    optimizer: Literal["adamw", "lamb", "lars"] = Field("adamw", description="update rule")
    lr: float = Field(1e-3, gt=0.0, le=100.0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0.0, le=10.0, description="decoupled weight decay of matrices")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="share of the steps that warm up")
    decay: Literal["constant", "linear", "cosine"] = Field("cosine", description="form of the decay after warm-up")
    batch_size: int = Field(8, ge=1, description="sequences of one optimizer step, over all ranks")
    micro_batch_size: int = Field(
        4, ge=1, description="sequences of one forward pass on one rank", json_schema_extra=_ELASTIC
    )
    engine: Literal["deepspeed", "plain"] = Field(
        "deepspeed", description="deepspeed through Accelerate, or plain PyTorch in one process"
    )
    world_size: int = Field(2, ge=1, le=65536, description="ranks: one process each", json_schema_extra=_ELASTIC)
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage", json_schema_extra=_ELASTIC)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic; bf16 keeps fp32 master weights")
    lisa_layers: int = Field(0, ge=0, le=512, description="layers that train at a time under LISA; 0: all of them")
    lisa_interval: int = Field(20, ge=1, description="steps between LISA's draws")
    validate_every: int = Field(50, ge=1, description="steps between validations; one follows the last step")
    validation_sequences: int = Field(64, ge=1, description="validation sequences used each time, at most")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints", json_schema_extra=_NOT_IDENTITY)
    baselines: bool = Field(True, description="also make the baselines (they cost as much as the method itself)")

    @property
    def needs_teacher(self) -> bool:
        """Whether training needs the outputs of a teacher."""
        return False

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights, not from the base's."""
        return False

    def changed(self, method: str, **changes: Any) -> dict[str, Any]:
        """Return the table of a baseline by the same method: some parameters changed, and no baselines of its own."""
        return self.model_dump(mode="json") | {"method": method, "baselines": False} | changes

    def full_precision(self, **changes: Any) -> dict[str, Any]:
        """Return the table of a baseline that trains as long on the same data, but compresses nothing."""
        return self.schedule() | {"method": "finetune", "baselines": False} | changes

    def schedule(self) -> dict[str, Any]:
        """Return the parameters that say how to train, without those of the method."""
        return {name: getattr(self, name) for name in TrainedConfig.model_fields}

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        batch_split.refuse_uneven("batch_size", self.batch_size, self.world_size, self.micro_batch_size)
        return self

    @model_validator(mode="after")
    def _plain_is_one_process(self) -> Self:
        batch_split.refuse_spread_plain(self.engine, self.world_size, self.zero_stage)
        return self


@dataclass(frozen=True)
class Step:
    """What a loss is computed from: one micro batch of one step."""

    student: nn.Module
    teacher: nn.Module | None
    """Frozen; there if `TrainedConfig.needs_teacher`."""
    inputs_BT: Tensor
    targets_BT: Tensor
    """`IGNORED` where nothing is asked."""
    number: int
    """Steps already done; with the seed, the only source of randomness."""
    seed: int


T = TypeVar("T", bound=TrainedConfig)


class TrainingMethod(PackingMethod[T]):
    """A method that trains a compressed model; as it stands, one that goes on training an ordinary model."""

    kind: ClassVar[Kind] = "training"
    calibration: ClassVar[Calibration] = "none"

    def shape(self, base: Shape, config: T) -> Shape:  # noqa: ARG002
        """Return the shape of the model that is trained.

        Raises:
            ValueError: the configuration does not fit the base model.
        """
        return base

    def source_layer(self, layer: int, base: Shape, config: T) -> int:  # noqa: ARG002
        """Return the layer of the base model that a layer starts from."""
        return layer

    def transform(self, model: nn.Module, names: Sequence[str], config: T) -> None:
        """Replace the named linear layers by ones that can be trained in compressed form, in place.

        Raises:
            ValueError: the method does not fit the model.
        """

    def loss(self, step: Step, config: T) -> Tensor:  # noqa: ARG002
        """Return the summed nats of a micro batch."""
        return language_loss(step)

    def finish(self, model: nn.Module, config: T) -> dict[str, Packed]:  # noqa: ARG002
        """Bring the model into the form of its configuration, in place; return what is stored packed, by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], config: T) -> Packed:  # noqa: ARG002
        """Rebuild a packed weight from its stored tensors.

        Raises:
            ValueError: the method packs nothing.
        """
        raise ValueError(f"{self.name} stores ordinary weights; no layer of it is packed")

    def baselines(self, config: T) -> dict[str, dict[str, Any]]:  # noqa: ARG002
        """Return name -> table of a compress configuration to compare the result with."""
        return {}


def widened(base: Shape, times: int) -> Shape:
    """Return a shape so many times as wide; the size of a head stays."""
    wider = {"width": base.width * times, "ffn_width": base.ffn_width * times, "heads": base.heads * times}
    if base.kv_heads:
        wider["kv_heads"] = base.kv_heads * times
    return base.model_copy(update=wider)


def refuse_wider_base(widen: int, *, from_scratch: bool) -> None:
    """Refuse to start a wider model from the base's weights.

    Raises:
        ValueError: they do not fit.
    """
    if widen > 1 and not from_scratch:
        raise ValueError(f"widen = {widen}: the base's weights do not fit; valid: 1, or init_from = scratch")


def refuse_zeros_of_nothing(*, keep_zeros: bool, from_scratch: bool) -> None:
    """Refuse to keep the zeros of a base where training starts from random weights.

    Raises:
        ValueError: there are none.
    """
    if keep_zeros and from_scratch:
        raise ValueError("keep_zeros does nothing here: random weights have no zeros; it goes with init_from = base")


def language_loss(step: Step) -> Tensor:
    """Return the summed nats of the targets."""
    from models.architectures import predict

    return predict.language_nats(step.student, step.inputs_BT, step.targets_BT)


def uniform(seed: int, purpose: str, step: int, *place: int) -> float:
    """Return a number in [0, 1) that depends on the arguments alone, equal on all ranks."""
    import hashlib

    text = "/".join(str(part) for part in (purpose, seed, step, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return linear layers by name.

    Raises:
        TypeError: one of them is no linear layer.
    """
    import torch

    layers = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, torch.nn.Linear):
            raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
        layers[name] = module
    return layers


def keep_zeros(model: nn.Module, names: Sequence[str]) -> None:
    """Let the weights of the named layers that are zero stay zero, in place."""
    from models.compression.modules.masked import MaskedLinear

    put_layers(model, {name: MaskedLinear(module) for name, module in linear_layers(model, names).items()})


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put modules in the places that their dotted names say."""
    for name, module in layers.items():
        model.set_submodule(name, module)
