"""What calibration shows a model, and what it records: the input second moment of each layer of one block.

Bounded memory: one block, the hidden states of the calibration sequences, and one I x I matrix for each of its layers.
Shapes: N sequences, T tokens, D width, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.compression.base import Statistics
from pipelines.data.shards import ShardReader
from pipelines.errors import IntegrityError, NumericError

_BATCH = 8
_PURPOSE = 0xC0
"""Sets the random stream of calibration apart from others with the same seed."""
_HIDDEN_SHARE = 0.3
"""Share of tokens that an encoder sees masked, near the middle of what masked language models train with."""


@dataclass
class Prefix:
    """The state of the model between two blocks: hidden states, and what every block is called with besides them."""

    hidden: list[Tensor]
    """Batches [B, T, D], all of one size."""
    arguments: list[dict[str, Any]] = field(default_factory=list)
    """Keyword arguments of each block: masks, position embeddings."""

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of block `index`."""
        for position, hidden_BTD in enumerate(self.hidden):
            self.hidden[position] = _tensor(block(hidden_BTD, **self.arguments[index]))


def sample_tokens(prepare: Path, *, samples: int, seed: int, masked: bool) -> NDArray[np.int64]:
    """Return N train sequences [N, T], a pure function of the seed; fewer when the split holds fewer.

    Args:
        prepare: folder of a prepare artifact.
        samples: how many sequences.
        seed: seed of the choice.
        masked: hide a share of the tokens behind the mask token, as an encoder was trained to see them.

    Raises:
        IntegrityError: the train split is empty.
    """
    train = ShardReader(prepare, "train")
    if not len(train):
        raise IntegrityError(f"{prepare}: the train split is empty, so there is nothing to calibrate on")
    generator = np.random.default_rng([seed, _PURPOSE])
    tokens_NT = train.take(np.sort(generator.choice(len(train), size=min(samples, len(train)), replace=False)))
    if masked:
        special = [train.index[key] for key in ("bos_id", "eos_id", "pad_id", "mask_id")]
        hidden = (generator.random(tokens_NT.shape) < _HIDDEN_SHARE) & ~np.isin(tokens_NT, special)
        tokens_NT = np.where(hidden, train.index["mask_id"], tokens_NT)
    return tokens_NT


@torch.no_grad()
def enter(model: PreTrainedModel, stack: nn.ModuleList, tokens_NT: NDArray[np.int64], device: torch.device) -> Prefix:
    """Return the hidden states in front of the first block, and the arguments that each block is given.

    Every block is stood in for by a recorder that passes its input on, so only the parameters outside the stack are
    used, and a model whose layers differ in masks or positions is recorded as it is.
    """
    prefix = Prefix(hidden=[])
    arguments: list[dict[str, Any]] = []
    entered: list[Tensor] = []

    def record(hidden_BTD: Tensor, **kwargs: Any) -> Tensor:
        entered.append(hidden_BTD)
        arguments.append({k: v for k, v in kwargs.items() if k not in {"past_key_values", "use_cache"}})
        return hidden_BTD

    originals = [block.forward for block in stack]
    body = model.base_model
    try:
        for block in stack:
            block.forward = record
        for batch_BT in _batches(tokens_NT):
            entered.clear()
            arguments.clear()
            body(input_ids=torch.from_numpy(batch_BT).to(device))
            prefix.hidden.append(entered[0])
    finally:
        for block, original in zip(stack, originals, strict=True):
            block.forward = original
    # All batches have one shape and no padding, so the arguments of the last one hold for all.
    prefix.arguments = list(arguments)
    return prefix


@torch.no_grad()
def measure(block: nn.Module, layers: Mapping[str, nn.Linear], index: int, prefix: Prefix) -> dict[str, Statistics]:
    """Return the input statistics of `layers` (name -> module of the block) over all calibration tokens.

    Raises:
        NumericError: an activation is not finite.
    """
    sums = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in layers.items()}
    tokens = 0
    hooks = [module.register_forward_pre_hook(_accumulate(sums[name])) for name, module in layers.items()]
    try:
        for hidden_BTD in prefix.hidden:
            block(hidden_BTD, **prefix.arguments[index])
            tokens += hidden_BTD.shape[0] * hidden_BTD.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    for name, hessian_II in sums.items():
        if not bool(torch.isfinite(hessian_II).all()):
            raise NumericError(f"{name}: calibration met activations that are not finite")
    return {name: Statistics(hessian_II, tokens) for name, hessian_II in sums.items()}


def _accumulate(sum_II: Tensor) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows_NI = inputs[0].detach().flatten(0, -2).double()
        sum_II.add_((rows_NI.T @ rows_NI).cpu())

    return hook


def _batches(tokens_NT: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cut the sequences into batches of one size: the largest divisor of N up to `_BATCH`."""
    count = len(tokens_NT)
    size = max(n for n in range(1, _BATCH + 1) if count % n == 0)
    yield from (tokens_NT[start : start + size] for start in range(0, count, size))


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
