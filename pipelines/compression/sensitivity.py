"""Squared gradients of the parent's loss, weight by weight: the diagonal of the empirical Fisher information.

For each calibration sequence s the loss is summed over its tokens, and F = sum over s of (dL_s / dW)^2.

Bounded memory: blocks are loaded one at a time, once on the way up and once on the way down. The hidden states between
blocks and the squares of a block lie in files meanwhile, because together they would be larger than the model.
Shapes: N sequences, T tokens, B sequences of a batch, D width, V vocabulary, O and I features of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.compression import calibration
from pipelines.compression.calibration import IGNORED, Prefix
from pipelines.core.errors import NumericError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader


def record(
    model: PreTrainedModel,
    reader: WeightReader,
    names: Sequence[str],
    tokens_NT: NDArray[np.int64],
    labels_NT: NDArray[np.int64],
    *,
    folder: Path,
    device: torch.device,
) -> None:
    """Fill `folder` with the squared gradients of the layers `names`, one file for each block; see `read`.

    Args:
        model: skeleton from `skeleton.build`; its parameters come and go.
        reader: where the parent's weights are.
        names: linear layers inside the stack.
        tokens_NT: calibration sequences.
        labels_NT: what the logits of each position should say, from `calibration.labels`.
        folder: where to write; made if missing.
        device: where blocks are computed.

    Raises:
        NumericError: a gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, reader, device)
    model.tie_weights()
    prefix = calibration.enter(model, layers, tokens_NT, device)
    for index, block in enumerate(layers):
        save_file(_numbered(prefix.hidden), folder / f"hidden-{index}.safetensors")
        with _loaded(block, f"{stack}.{index}", reader, device, model.dtype):
            prefix.advance(index, block)
    upper = _above(model, layers, prefix.hidden, tokens_NT, labels_NT)
    for index, block in reversed(list(enumerate(layers))):
        lower = Prefix(_hidden(folder / f"hidden-{index}.safetensors", device), prefix.arguments)
        place = f"{stack}.{index}"
        with _loaded(block, place, reader, device, model.dtype):
            chosen = {n: model.get_submodule(n) for n in names if n.startswith(f"{place}.")}
            squares, upper = _below(block, chosen, index, lower, upper)
        for name, square_OI in squares.items():
            if not bool(torch.isfinite(square_OI).all()):
                raise NumericError(f"{name}: a gradient on the calibration sequences is not finite")
        save_file(squares, folder / f"block-{index}.safetensors")
        (folder / f"hidden-{index}.safetensors").unlink()


def read(folder: Path, index: int) -> dict[str, Tensor]:
    """Return the squared gradients [O, I], float32, of the layers of block `index`."""
    return load_file(folder / f"block-{index}.safetensors")


def _above(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    hidden: list[Tensor],
    tokens_NT: NDArray[np.int64],
    labels_NT: NDArray[np.int64],
) -> list[Tensor]:
    """Return dL/dh [B, T, D] of every batch, h being the hidden states behind the last block."""
    slopes: list[Tensor] = []
    pairs = zip(calibration.batches(tokens_NT), calibration.batches(labels_NT), hidden, strict=True)
    for tokens_BT, labels_BT, hidden_BTD in pairs:
        leaf_BTD = hidden_BTD.clone().requires_grad_()
        with _replaced(layers, leaf_BTD):
            logits_BTV = model(input_ids=torch.from_numpy(tokens_BT).to(leaf_BTD.device)).logits
        labels = torch.from_numpy(labels_BT).to(leaf_BTD.device).flatten()
        loss = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        slopes.extend(torch.autograd.grad(loss, leaf_BTD))
    return slopes


def _below(
    block: nn.Module, chosen: Mapping[str, nn.Module], index: int, prefix: Prefix, upper: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the squared gradients of one block's layers, and dL/dh of its inputs."""
    squares = {n: torch.zeros_like(m.get_parameter("weight"), dtype=torch.float32) for n, m in chosen.items()}
    hooks = [module.register_forward_hook(_squaring(squares[name])) for name, module in chosen.items()]
    lower: list[Tensor] = []
    try:
        for hidden_BTD, slope_BTD in zip(prefix.hidden, upper, strict=True):
            leaf_BTD = hidden_BTD.requires_grad_()
            output_BTD = calibration.first_output(block(leaf_BTD, **prefix.arguments[index]))
            lower.extend(torch.autograd.grad(output_BTD, leaf_BTD, slope_BTD))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: square_OI.cpu() for name, square_OI in squares.items()}, lower


def _squaring(square_OI: Tensor) -> Any:
    """Return a forward hook that adds (dL_s / dW)^2 of each sequence s of the batch to `square_OI` on the way back."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output_BTO: Tensor) -> None:
        inputs_BTI = inputs[0].detach()

        def add(slope_BTO: Tensor) -> None:
            for inputs_TI, slope_TO in zip(inputs_BTI.float(), slope_BTO.float(), strict=True):
                square_OI.add_((slope_TO.T @ inputs_TI).square())

        output_BTO.register_hook(add)

    return hook


@contextlib.contextmanager
def _loaded(
    block: nn.Module, place: str, reader: WeightReader, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    meta_init.load(block, place, reader, device, dtype)
    yield
    meta_init.release(block)


@contextlib.contextmanager
def _replaced(layers: nn.ModuleList, output_BTD: Tensor) -> Iterator[None]:
    """Let the stack of blocks return `output_BTD`, whatever enters it."""
    originals = [block.forward for block in layers]
    try:
        for block in layers:
            block.forward = lambda *_args, **_kwargs: output_BTD
        yield
    finally:
        for block, original in zip(layers, originals, strict=True):
            block.forward = original


def _numbered(hidden: list[Tensor]) -> dict[str, Tensor]:
    return {f"{number:06d}": hidden_BTD.contiguous() for number, hidden_BTD in enumerate(hidden)}


def _hidden(path: Path, device: torch.device) -> list[Tensor]:
    return [hidden_BTD.to(device) for _, hidden_BTD in sorted(load_file(path).items())]
