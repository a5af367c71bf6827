"""PB-LLM's quantization-aware training: salient weights frozen on 8 bits, the others binary while they train.

As in the paper, what is salient is decided once, by magnitude, and keeps its codes; every other weight is seen as one
of two values, mean + a sign(w - mean) with a = mean |w - mean|, the L2-optimal scale, both taken anew in every step
over the binary weights of a row (and group). Neither passes a gradient on; the sign passes it straight through. (The
released code has one scale for the whole matrix.) Biases, norms and embeddings train too. Stored as `pb_llm` stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from models.compression import pb_llm, training_method
from models.compression.base import Packed
from models.compression.formats import binary
from models.compression.training_method import TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


class Config(TrainedConfig):
    """Parameters of training the binary part of PB-LLM."""

    salient: float = Field(0.1, ge=0.0, le=0.9, description="share of weights that keep 8 bits, frozen")
    group_size: int = Field(0, ge=0, le=65536, description="columns that share their numbers; 0: the whole row")

    @property
    def label(self) -> str:
        """For instance `10`, `30-g128`."""
        return self.stored.label

    @property
    def stored(self) -> pb_llm.Config:
        """The same storage without training."""
        return pb_llm.Config(salient=self.salient, group_size=self.group_size)


def begin(weight_OI: Tensor, config: Config) -> pb_llm.MixedPacked:
    """Return what a weight is before the first step: each one rounded alone."""
    salient_OI = pb_llm.highest(weight_OI.abs(), config.salient)
    return pb_llm.pack(weight_OI.float(), salient_OI, pb_llm.fit(weight_OI, salient_OI, config.stored))


def quantize(weight_OI: Tensor, salient_OI: Tensor, frozen_OI: Tensor, config: Config) -> Tensor:
    """Return the weight as the layer computes with it [O, I]; the gradient is 1 for binary weights, 0 for salient ones.

    Args:
        weight_OI: what trains.
        salient_OI: bool, which weights are frozen.
        frozen_OI: what those are, float32.
        config: groups of columns that share their two values.
    """
    real_OI = weight_OI.detach().float()
    _, *levels = pb_llm.fit(real_OI, salient_OI, config.stored)
    size = real_OI.shape[1] // levels[0].shape[1]
    mean_OI, amplitude_OI = (values_OG.repeat_interleave(size, dim=1) for values_OG in levels)
    two_OI = binary.two_values(mean_OI, amplitude_OI, real_OI >= mean_OI)
    exact_OI = torch.where(salient_OI, frozen_OI, two_OI).to(weight_OI.dtype)
    carrier_OI = weight_OI * ~salient_OI
    return exact_OI + (carrier_OI - carrier_OI.detach())


def pack(weight_OI: Tensor, start: pb_llm.MixedPacked, config: Config) -> pb_llm.MixedPacked:
    """Return the codes of the start beside the signs and levels of now."""
    start = start.to(weight_OI.device)
    now = pb_llm.fit(weight_OI, start.salient_OI, config.stored)._replace(scale_OG=start.levels.scale_OG)
    return replace(pb_llm.pack(weight_OI.float(), start.salient_OI, now), codes=start.codes)


class Method(TrainingMethod[Config], config=Config):
    """Training of the binary part of PB-LLM."""

    bits: ClassVar[str] = "about 2 + 7 x share of salient weights"
    paper: ClassVar[str] = "Shang et al. 2023, PB-LLM: Partially Binarized Large Language Models (arXiv 2310.00034)"

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Binarize every named layer in part while it trains."""
        import functools

        from models.compression.modules.partly_binary import PartlyBinaryLinear

        rule = functools.partial(quantize, config=config)
        linear = training_method.linear_layers(model, names)
        made = {
            name: PartlyBinaryLinear(layer, begin(layer.weight.detach(), config), rule)
            for name, layer in linear.items()
        }
        training_method.put_layers(model, made)

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:
        """Return the trained layers as stored."""
        from models.compression.modules.partly_binary import PartlyBinaryLinear

        found = {name: module for name, module in model.named_modules() if isinstance(module, PartlyBinaryLinear)}
        return {name: pack(module.weight.detach(), module.start, config) for name, module in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:
        """Rebuild a packed weight from its stored tensors."""
        return pb_llm.Method().restore(tensors, config.stored)

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return no training, PB-LLM after training (equal bytes), equal steps all binary, and in full precision."""
        baselines: dict[str, dict[str, Any]] = {
            "untrained": config.changed("pb_llm_tune", steps=0),
            "pb_llm": {"method": "pb_llm"} | config.stored.model_dump(include={"salient", "group_size"}),
            "continued fp32": config.full_precision(),
        }
        return baselines | ({"all binary": config.changed("pb_llm_tune", salient=0.0)} if config.salient else {})
