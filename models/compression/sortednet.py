"""SortedNet: a model trained so that each of its first d layers, with the shared norm and head, is a model of its own.

One forward pass gives the state after every layer; the loss is the mean of the nats of all chosen depths (the variant
for fine-tuning, SoFT, arXiv 2309.08968). The variant is cut at one depth and is an ordinary model; `steps = 0` with
`from` cuts an already sorted variant again, at any depth, without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from models.architectures.config import IGNORED
from models.compression import training_method
from models.compression.base import Packed
from models.compression.training_method import Step, TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


class Config(TrainedConfig):
    """Parameters of SortedNet."""

    depth: int = Field(
        0, ge=0, le=512, description="layers that the variant keeps; 0: all, to be cut by later variants"
    )
    exits: tuple[int, ...] = Field((), description="depths that are trained to be cut at; none: every depth")
    drawn: int = Field(0, ge=0, le=512, description="depths drawn for each step, beside the full one; 0: all of them")

    @property
    def label(self) -> str:
        """For instance `d2`, `d2-cut`, `all`."""
        return (f"d{self.depth}" if self.depth else "all") + ("" if self.steps else "-cut")


def exits(config: Config, layers: int, *, seed: int, step: int) -> tuple[int, ...]:
    """Return the depths whose nats a step adds up, ascending; the same on every rank.

    The deepest is in every step, so that no layer is ever without a gradient: an optimizer under ZeRO 1 to 3 could not
    tell such a layer from one whose gradient is zero.
    """
    chosen = sorted(set(config.exits) or range(1, layers + 1))
    if not config.drawn or config.drawn >= len(chosen) - 1:
        return tuple(chosen)
    keys = {depth: training_method.uniform(seed, "sortednet", step, depth) for depth in chosen[:-1]}
    return (*sorted(sorted(keys, key=keys.__getitem__)[: config.drawn]), chosen[-1])


def truncate(model: Any, depth: int) -> None:
    """Keep the first layers only, in place."""
    from models.architectures import predict

    del predict.stack(model)[depth:]
    model.config.num_hidden_layers = depth
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = list(model.config.layer_types)[:depth]


class Method(TrainingMethod[Config], config=Config):
    """SortedNet."""

    bits: ClassVar[str] = "32, fewer layers"
    paper: ClassVar[str] = "Valipour et al. 2023, SortedNet (arXiv 2309.00255) and Sorted LLaMA (arXiv 2309.08968)"

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:  # noqa: ARG002
        """Check the depths; where one alone is trained, cut there before training.

        Raises:
            ValueError: a depth that the model does not have.
        """
        from models.architectures import predict

        layers = len(predict.stack(model))
        for depth in (*config.exits, config.depth):
            if depth > layers:
                raise ValueError(f"sortednet: depth {depth}, but the model has {layers} layers; valid: 1 to {layers}")
        if config.exits and 0 in config.exits:
            raise ValueError(f"sortednet: exits = {list(config.exits)}; a model has at least 1 layer")
        if config.exits and max(config.exits) < layers:
            truncate(model, max(config.exits))

    def loss(self, step: Step, config: Config) -> Tensor:
        """Return the mean of the summed nats of the step's depths."""
        from models.architectures import predict

        asked_BT = step.targets_BT != IGNORED
        targets_N = step.targets_BT[asked_BT]
        outputs, last_BTD = predict.layer_outputs(step.student, step.inputs_BT)
        norm = predict.final_norm(step.student)
        nats = []
        for depth in exits(config, len(outputs), seed=step.seed, step=step.number):
            hidden_BTD = last_BTD if depth == len(outputs) else norm(outputs[depth - 1])
            nats.append(predict.summed_nats(predict.logits(step.student, hidden_BTD[asked_BT]), targets_N))
        return torch.stack(nats).mean()

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:
        """Cut the model; pack nothing."""
        from models.architectures import predict

        if config.depth and config.depth < len(predict.stack(model)):
            truncate(model, config.depth)
        return {}

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return the base cut without training, and cut first and trained at that depth alone for equal steps."""
        if not config.depth or not config.steps:
            return {"continued": config.full_precision()} if config.steps else {}
        return {
            "cut": config.changed("sortednet", steps=0),
            "trained alone": config.changed("sortednet", exits=(config.depth,)),
        }
