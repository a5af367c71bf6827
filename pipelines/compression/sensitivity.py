"""How sensitive the base model's loss is to its weights: squared gradients of each, and curvature along each layer.

Squared gradients are the diagonal of the empirical Fisher information: for each document s of the calibration sequences
the loss is summed over its tokens, and F = sum over s of (dL_s / dW)^2. Bounded memory: blocks are loaded one at a
time, once on the way up and once on the way down. The hidden states between blocks and the squares of a block lie in
files meanwhile, because together they would be larger than the model.

Curvature is the mean of the diagonal of the loss's Hessian along a layer, by Hutchinson's estimate: for Rademacher v,
E[v^T H v] = tr H. One backward pass through the gradient gives H v for all layers at once; what one layer's v sees of
another's averages out. Every batch of documents draws its own probes. The whole model and the graph of two
backward passes of one batch are in memory.

Shapes: B sequences of a batch, L tokens, D width, V vocabulary, O and I features of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from models.architectures.config import IGNORED
from pipelines.compression import calibration
from pipelines.compression.calibration import Batch, Prefix
from pipelines.compression.run import CompressionRun
from pipelines.core.errors import NumericError
from pipelines.modelio import meta_init

_PURPOSE = 0x4C
"""Sets the random stream of curvature's probes apart from others with the same seed."""


# ---- squared gradients ------------------------------------------------------------------------------------------


def record(run: CompressionRun, names: Sequence[str]) -> None:
    """Fill `run.fisher` with the squared gradients of the layers `names`, one file for each block; see `read`.

    Raises:
        NumericError: a gradient is not finite.
    """
    folder, model, device = run.fisher, run.base, run.device
    folder.mkdir(parents=True, exist_ok=True)
    stack, layers = meta_init.blocks(model)
    meta_init.load_rest(model, stack, run.reader, device)
    model.tie_weights()
    in_tuples = run.description.in_tuples
    prefix = calibration.enter(model, layers, run.text, device, in_tuples=in_tuples)
    for index, block in enumerate(layers):
        save_file(_numbered(prefix.hidden), folder / f"hidden-{index}.safetensors")
        with _loaded(run, block, f"{stack}.{index}"):
            prefix.advance(index, block)
    upper = _above(model, layers, prefix.hidden, run.text, in_tuples=in_tuples)
    for index, block in reversed(list(enumerate(layers))):
        lower = replace(prefix, hidden=_hidden(folder / f"hidden-{index}.safetensors", device))
        place = f"{stack}.{index}"
        with _loaded(run, block, place):
            squares, upper = _below(block, calibration.linear_layers(model, place, names), index, lower, upper)
        for name, square_OI in squares.items():
            if not bool(torch.isfinite(square_OI).all()):
                raise NumericError(f"{name}: a gradient on the calibration sequences is not finite")
        save_file(squares, folder / f"block-{index}.safetensors")
        (folder / f"hidden-{index}.safetensors").unlink()


def read(folder: Path, index: int, device: torch.device) -> dict[str, Tensor]:
    """Return the squared gradients [O, I], float32, of the layers of block `index`."""
    stored = load_file(folder / f"block-{index}.safetensors")
    return {name: square_OI.to(device) for name, square_OI in stored.items()}


def _above(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    hidden: list[Tensor],
    text: Sequence[Batch],
    *,
    in_tuples: bool,
) -> list[Tensor]:
    """Return dL/dh [B, L, D] of every batch, h being the hidden states behind the last block."""
    slopes: list[Tensor] = []
    for batch, hidden_BLD in zip(text, hidden, strict=True):
        leaf_BLD = hidden_BLD.clone().requires_grad_()
        with calibration.standing_in(layers, [_constant(leaf_BLD)] * len(layers), in_tuples=in_tuples):
            logits_BLV = model(input_ids=torch.from_numpy(batch.tokens_BL).to(leaf_BLD.device)).logits
        labels = torch.from_numpy(batch.labels_BL).to(leaf_BLD.device).flatten()
        loss = nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        slopes.extend(torch.autograd.grad(loss, leaf_BLD))
    return slopes


def _below(
    block: nn.Module, linear: Mapping[str, nn.Linear], index: int, prefix: Prefix, upper: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the squared gradients of one block's layers, and dL/dh of its inputs."""
    squares = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in linear.items()}
    hooks = [module.register_forward_hook(_squaring(squares[name])) for name, module in linear.items()]
    lower: list[Tensor] = []
    try:
        for number, slope_BLD in enumerate(upper):
            leaf_BLD = prefix.hidden[number].requires_grad_()
            output_BLD = prefix.output(index, block, number)
            lower.extend(torch.autograd.grad(output_BLD, leaf_BLD, slope_BLD))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: square_OI.cpu() for name, square_OI in squares.items()}, lower


def _squaring(square_OI: Tensor) -> Any:
    """Return a forward hook that adds (dL_s / dW)^2 of each sequence s of the batch to `square_OI` on the way back."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output_BLO: Tensor) -> None:
        inputs_BLI = inputs[0].detach()

        def add(slope_BLO: Tensor) -> None:
            for inputs_LI, slope_LO in zip(inputs_BLI.float(), slope_BLO.float(), strict=True):
                square_OI.add_((slope_LO.T @ inputs_LI).square())

        output_BLO.register_hook(add)

    return hook


@contextlib.contextmanager
def _loaded(run: CompressionRun, block: nn.Module, place: str) -> Iterator[None]:
    meta_init.load(block, place, run.reader, run.device, run.base.dtype)
    yield
    meta_init.release(block)


def _constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: value


def _numbered(hidden: list[Tensor]) -> dict[str, Tensor]:
    return {f"{number:06d}": hidden_BLD.cpu().contiguous() for number, hidden_BLD in enumerate(hidden)}


def _hidden(path: Path, device: torch.device) -> list[Tensor]:
    return [hidden_BLD.to(device) for _, hidden_BLD in sorted(load_file(path).items())]


# ---- curvature --------------------------------------------------------------------------------------------------


def traces(
    model: PreTrainedModel,
    names: Sequence[str],
    text: Sequence[Batch],
    *,
    probes: int,
    seed: int,
) -> dict[str, float]:
    """Return tr(H_i) / n_i of each layer: the mean second derivative of the mean loss, below zero where noise rules.

    Args:
        model: the whole base model; only the layers `names` will require gradients.
        names: linear layers.
        text: calibration documents.
        probes: random directions for each batch of documents.
        seed: of the directions.

    Raises:
        NumericError: a second derivative is not finite.
    """
    model.requires_grad_(requires_grad=False)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
    sums, asked = [0.0] * len(names), sum(int((batch.labels_BL != IGNORED).sum()) for batch in text)
    for number, batch in enumerate(text):
        generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, number, _PURPOSE]).integers(2**62)))
        for index, value in enumerate(_quadratics(model, weights, batch, probes, generator)):
            sums[index] += value
    means = {n: s / (asked * w.numel()) for n, s, w in zip(names, sums, weights, strict=True)}
    for name, value in means.items():
        if not np.isfinite(value):
            raise NumericError(f"{name}: a second derivative on the calibration sequences is not finite")
    return means


def _quadratics(
    model: PreTrainedModel,
    weights: Sequence[torch.Tensor],
    batch: Batch,
    probes: int,
    generator: torch.Generator,
) -> list[float]:
    """Return the mean over probes of v^T H v for each weight, H being that of the summed loss of one batch."""
    device = weights[0].device
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits_BLV = model(input_ids=torch.from_numpy(batch.tokens_BL).to(device)).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1),
        torch.from_numpy(batch.labels_BL).to(device).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    sums = [0.0] * len(weights)
    for probe in range(probes):
        signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
        along = torch.stack([(slope * sign).sum() for slope, sign in zip(slopes, signs, strict=True)]).sum()
        curved = torch.autograd.grad(along, weights, retain_graph=probe + 1 < probes)
        for index, (sign, product) in enumerate(zip(signs, curved, strict=True)):
            sums[index] += float((sign * product).double().sum()) / probes
    return sums
