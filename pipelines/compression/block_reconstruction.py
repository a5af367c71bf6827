"""Block-wise optimisation: what is stored of a block's layers is learned, so that the block's output comes out right.

A layer takes part through a `Learnable`: a module with parameters that gives the weight it stands for, with gradients,
and in the end the packed layer. The target is the output of the original block behind original blocks, so a block also
makes up for the errors of those before it (as in BRECQ, Li et al. 2021, arXiv 2102.05426, and PTQ1.61).

A step learns from batches of several lengths together (`Prefix.groups`), so that each has about as many tokens. Every
fourth group of batches is not learned from but judges: where the stored block is no nearer to
its target on those than it was, it stays as it was. At 3 bits and more GPTQ is often so near that learning only fits
what it sees.

Shapes: B sequences of a batch, L tokens, D width, O and I features of a layer, G groups of S columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.compression.base import Packed
from models.compression.formats.int_grid import Grid, IntPacked, grouped
from models.compression.formats.quantized_input import InputPacked
from pipelines.compression.calibration import Prefix
from pipelines.core.errors import NumericError

RATES = {"scale": 5e-3, "latent": 2e-2}
"""Learning rates of AdamW: of logarithms of scales, and of weights in units of their scale."""


class Learnable(nn.Module, ABC):
    """One layer's stored tensors as parameters."""

    packed: Packed
    """The layer as it was before; says how inputs are rounded."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight [O, I] that the parameters stand for, with gradients."""

    @abstractmethod
    def pack(self) -> Packed:
        """Return the layer as it is stored."""

    def rates(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer."""
        return [{"params": [p], "lr": RATES[name]} for name, p in self.named_parameters()]

    def forward(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """Apply the layer to x [..., I]; gradients pass the rounding of inputs unchanged."""
        rounded = x + (self.packed.inputs(x) - x).detach() if self.packed.rounds_inputs else x
        return nn.functional.linear(rounded, self.weight().to(x.dtype), bias_O)


class GridLearnable(Learnable):
    """Scales of an integer grid, and which of its points each weight goes to.

    Args:
        weight_OI: the original weight, float32.
        packed: where to start: an `IntPacked`, its inputs rounded or not.
    """

    def __init__(self, weight_OI: Tensor, packed: Packed) -> None:
        super().__init__()
        stored = _grid_of(packed)
        assert stored is not None
        self.packed, self._grid = packed, stored.grid
        groups = stored.grid.scale_OG.shape[1]
        codes_OGS = grouped(stored.codes_OI, groups).float()
        zero = 0.0 if self._grid.zero_OG is None else self._grid.zero_OG.unsqueeze(-1)
        scaled_OGS = grouped(weight_OI.float(), groups) / self._grid.scale_OG.unsqueeze(-1) + zero
        # The nearest place to the original weight that rounds to the code it has now.
        self.latent = nn.Parameter(torch.clamp(scaled_OGS, codes_OGS - 0.49, codes_OGS + 0.49))
        self.scale = nn.Parameter(torch.zeros_like(self._grid.scale_OG))

    def weight(self) -> Tensor:
        """Return the weight [O, I]."""
        codes_OGS = self.latent + (self._codes() - self.latent).detach()
        zero = 0.0 if self._grid.zero_OG is None else self._grid.zero_OG.unsqueeze(-1)
        scale_OG = self._grid.scale_OG * self.scale.exp()
        return ((codes_OGS - zero) * scale_OG.unsqueeze(-1)).flatten(1)

    def pack(self) -> Packed:
        """Return the same layout with the learned codes and scales."""
        scale_OG = (self._grid.scale_OG * self.scale.detach().exp()).to(torch.bfloat16).float()
        grid = Grid(self._grid.bits, scale_OG, self._grid.zero_OG)
        made = IntPacked(self._codes().to(torch.int8).flatten(1), grid, torch.bfloat16)
        return replace(self.packed, weight=made) if isinstance(self.packed, InputPacked) else made

    def _codes(self) -> Tensor:
        lowest = self._grid.lowest
        return self.latent.detach().round().clamp(lowest, -lowest - 1)


def learnable(weight_OI: Tensor, packed: Packed) -> Learnable | None:
    """Return the parameters of a packed layer; None where its layout has none that can be learned."""
    return None if _grid_of(packed) is None else GridLearnable(weight_OI, packed)


@torch.enable_grad()
def optimise(
    block: nn.Module,
    learned: Mapping[str, Learnable],
    index: int,
    prefix: Prefix,
    targets: Sequence[Tensor],
    *,
    steps: int,
) -> tuple[float, float]:
    """Train `learned` until the block's outputs are near `targets`; returns the error of the judges before and after.

    Args:
        block: block `index`; layers that are not learned compute as they do.
        learned: name inside the block -> its parameters, trained in place.
        index: place of the block in the stack.
        prefix: hidden states in front of the block, behind the compressed ones.
        targets: outputs [B, L, D] that each batch of the prefix should have.
        steps: steps of AdamW, one group of batches each; the rates fall to zero linearly.

    Raises:
        NumericError: the loss is not finite.
    """
    train, judges = split(prefix.groups())
    hooks = [block.get_submodule(name).register_forward_hook(_replacing(layer)) for name, layer in learned.items()]
    optimizer = torch.optim.AdamW([group for layer in learned.values() for group in layer.rates()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    try:
        before = relative_error(block, index, prefix, targets, judges)
        for step in range(steps):
            loss = _loss(block, index, prefix, targets, train[step % len(train)])
            if not bool(torch.isfinite(loss)):
                raise NumericError(f"block {index}: the loss of block reconstruction is not finite at step {step}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return before, relative_error(block, index, prefix, targets, judges)
    finally:
        for hook in hooks:
            hook.remove()


Groups = list[list[int]]


def split(groups: Groups) -> tuple[Groups, Groups]:
    """Return the groups that are learned from and those that judge: every fourth; below four all do both."""
    judges = groups[3::4]
    return ([group for group in groups if group not in judges], judges) if judges else (groups, groups)


@torch.no_grad()
def relative_error(block: nn.Module, index: int, prefix: Prefix, targets: Sequence[Tensor], judges: Groups) -> float:
    """Return ||f(x) - target||^2 / ||target||^2, the mean over the groups `judges`."""
    losses = [_loss(block, index, prefix, targets, group) for group in judges]
    return float(torch.stack(losses).mean())


def _loss(block: nn.Module, index: int, prefix: Prefix, targets: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    errors = [(prefix.output(index, block, n) - targets[n]).float().square().sum() for n in group]
    sizes = [targets[n].float().square().sum() for n in group]
    return torch.stack(errors).sum() / torch.stack(sizes).sum()


def _replacing(layer: Learnable) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        output: Tensor = layer(inputs[0], module.bias)
        return output

    return hook


def _grid_of(packed: Packed) -> IntPacked | None:
    inner = packed.weight if isinstance(packed, InputPacked) else packed
    return inner if isinstance(inner, IntPacked) else None
