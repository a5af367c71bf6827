"""Structures: which attention groups and feed-forward neurons of each layer stay. A helper of the structured methods.

A *group* is one key head with the query heads that read it, so grouped queries stay grouped. Every layer loses the same
number of units, because public configurations have one number of heads and one feed-forward width for all layers.

Shapes: L layers, G groups of a layer, F neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import Field, model_validator

from models.compression.base import MethodConfig
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class StructureConfig(MethodConfig):
    """How much every layer loses."""

    heads: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of attention groups removed: a key head with its query heads (decoder)"
    )
    neurons: float = Field(0.25, ge=0.0, lt=1.0, description="share of feed-forward neurons removed")
    trials: int = Field(8, ge=1, le=10_000, description="random structures drawn as baselines")

    @property
    def label(self) -> str:
        """For instance `h25-n50`."""
        return f"h{self.heads * 100:g}-n{self.neurons * 100:g}".replace(".", "p")

    @model_validator(mode="after")
    def _removes_something(self) -> Self:
        if self.heads == 0 and self.neurons == 0:
            raise ValueError("heads = 0 and neurons = 0 remove nothing")
        return self


@dataclass(frozen=True)
class Structure:
    """What stays, as masks; equal numbers in every layer."""

    groups_LG: Tensor
    """bool."""
    neurons_LF: Tensor
    """bool."""

    def masks(self, kind: str) -> Tensor:
        """Return the masks of "groups" or "neurons"."""
        return self.groups_LG if kind == "groups" else self.neurons_LF


class MaskedModel(Protocol):
    """A model and its calibration data as a method sees them: losses with some units switched off."""

    layers: int
    groups: int
    """Attention groups of a layer that may be removed; 0 where the layout fixes their number."""
    neurons: int
    loadable_groups: Sequence[int]
    """Numbers of groups that a layer can be left with; [0] where the layout fixes their number."""
    costs: Mapping[str, int]
    """Multiplications of a token in the matrices of one unit: `groups` and `neurons`."""

    def loss(self, structure: Structure) -> float:
        """Return the calibration loss, nats a token, with everything else removed."""

    def trajectory(self, layer: int, kind: str, removed: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return what follows when only the units `removed` (bool) of one layer are.

        Returns:
            The sampled features [K, D] behind this block and all later ones, and the sampled logits [K, V].
        """

    def original(self, layer: int) -> tuple[Sequence[Tensor], Tensor]:
        """Return the same of the whole model."""

    def magnitudes(self) -> Mapping[str, Tensor]:
        """Return the summed squared weights of every unit: `groups` [L, G] and `neurons` [L, F]."""


def keep_best(
    groups_LG: Tensor, neurons_LF: Tensor, config: StructureConfig, counts: tuple[int, int] | None = None
) -> Structure:
    """Return the structure that keeps the highest scores of each layer; its masks are on the CPU.

    Args:
        groups_LG: scores of the groups.
        neurons_LF: scores of the neurons.
        config: shares to remove.
        counts: groups and neurons to keep instead.
    """
    groups, neurons = counts or (
        groups_LG.shape[1] - removed(groups_LG.shape[1], config.heads),
        neurons_LF.shape[1] - removed(neurons_LF.shape[1], config.neurons),
    )
    return Structure(_highest(groups_LG.cpu(), groups), _highest(neurons_LF.cpu(), neurons))


def shares_of(structure: Structure, config: StructureConfig) -> StructureConfig:
    """Return a configuration that removes as many units as a structure does."""
    kept = {"heads": structure.groups_LG, "neurons": structure.neurons_LF}
    shares = {key: 1.0 - float(mask.double().mean()) if mask.numel() else 0.0 for key, mask in kept.items()}
    return StructureConfig(trials=config.trials, **shares)


def draw(model: MaskedModel, config: StructureConfig, seed: int) -> Structure:
    """Return a random structure, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    groups_LG = torch.rand(model.layers, model.groups, generator=generator)
    return keep_best(groups_LG, torch.rand(model.layers, model.neurons, generator=generator), config)


def by_magnitude(model: MaskedModel, config: StructureConfig) -> Structure:
    """Return the structure that keeps the largest weights: the naive baseline."""
    sizes = model.magnitudes()
    return keep_best(sizes["groups"], sizes["neurons"], config)


def random_structures(model: MaskedModel, config: StructureConfig) -> tuple[Structure, Structure]:
    """Return the best and the median of `config.trials` random structures by calibration loss."""
    drawn = [draw(model, config, seed) for seed in range(config.trials)]
    ranked = sorted(range(len(drawn)), key=lambda n: (model.loss(drawn[n]), n))
    return drawn[ranked[0]], drawn[ranked[len(ranked) // 2]]


def removed(units: int, share: float) -> int:
    """Return how many units of a layer a share stands for; one always stays."""
    return min(round(units * share), max(units - 1, 0))


def _highest(score_LU: Tensor, kept: int) -> Tensor:
    keep = torch.ones_like(score_LU, dtype=torch.bool)
    order = torch.argsort(score_LU, dim=1, stable=True)
    return keep.scatter_(1, order[:, : score_LU.shape[1] - kept], value=False)
