"""How sensitive the base model's loss is to its weights: squared gradients of each, and curvature along each layer.

Squared gradients are the diagonal of the empirical Fisher information: for each calibration sequence s the loss is
summed over its tokens, and F = sum over s of (dL_s / dW)^2. Bounded memory: blocks are loaded one at a time, once on
the way up and once on the way down. The hidden states between blocks and the squares of a block lie in files meanwhile,
because together they would be larger than the model.

Curvature is the mean of the diagonal of the loss's Hessian along a layer, by Hutchinson's estimate: for Rademacher v,
E[v^T H v] = tr H. One backward pass through the gradient gives H v for all layers at once; what one layer's v sees of
another's averages out. Every batch of calibration sequences draws its own probes. The whole model and the graph of two
backward passes of one batch are in memory.

Shapes: N sequences, T tokens, B sequences of a batch, D width, V vocabulary, O and I features of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from models.architectures.config import IGNORED
from pipelines.compression import calibration
from pipelines.compression.calibration import Prefix
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
    prefix = calibration.enter(model, layers, run.tokens_NT, device, in_tuples=in_tuples)
    for index, block in enumerate(layers):
        save_file(_numbered(prefix.hidden), folder / f"hidden-{index}.safetensors")
        with _loaded(run, block, f"{stack}.{index}"):
            prefix.advance(index, block)
    upper = _above(model, layers, prefix.hidden, run.tokens_NT, run.labels_NT, in_tuples=in_tuples)
    for index, block in reversed(list(enumerate(layers))):
        lower = Prefix(_hidden(folder / f"hidden-{index}.safetensors", device), prefix.arguments)
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
    tokens_NT: NDArray[np.int64],
    labels_NT: NDArray[np.int64],
    *,
    in_tuples: bool,
) -> list[Tensor]:
    """Return dL/dh [B, T, D] of every batch, h being the hidden states behind the last block."""
    slopes: list[Tensor] = []
    pairs = zip(calibration.batches(tokens_NT), calibration.batches(labels_NT), hidden, strict=True)
    for tokens_BT, labels_BT, hidden_BTD in pairs:
        leaf_BTD = hidden_BTD.clone().requires_grad_()
        with calibration.standing_in(layers, [_constant(leaf_BTD)] * len(layers), in_tuples=in_tuples):
            logits_BTV = model(input_ids=torch.from_numpy(tokens_BT).to(leaf_BTD.device)).logits
        labels = torch.from_numpy(labels_BT).to(leaf_BTD.device).flatten()
        loss = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        slopes.extend(torch.autograd.grad(loss, leaf_BTD))
    return slopes


def _below(
    block: nn.Module, linear: Mapping[str, nn.Linear], index: int, prefix: Prefix, upper: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the squared gradients of one block's layers, and dL/dh of its inputs."""
    squares = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in linear.items()}
    hooks = [module.register_forward_hook(_squaring(squares[name])) for name, module in linear.items()]
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
def _loaded(run: CompressionRun, block: nn.Module, place: str) -> Iterator[None]:
    meta_init.load(block, place, run.reader, run.device, run.base.dtype)
    yield
    meta_init.release(block)


def _constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: value


def _numbered(hidden: list[Tensor]) -> dict[str, Tensor]:
    return {f"{number:06d}": hidden_BTD.cpu().contiguous() for number, hidden_BTD in enumerate(hidden)}


def _hidden(path: Path, device: torch.device) -> list[Tensor]:
    return [hidden_BTD.to(device) for _, hidden_BTD in sorted(load_file(path).items())]


# ---- curvature --------------------------------------------------------------------------------------------------


def traces(
    model: PreTrainedModel,
    names: Sequence[str],
    tokens_NT: NDArray[np.int64],
    labels_NT: NDArray[np.int64],
    *,
    probes: int,
    seed: int,
) -> dict[str, float]:
    """Return tr(H_i) / n_i of each layer: the mean second derivative of the mean loss, below zero where noise rules.

    Args:
        model: the whole base model; only the layers `names` will require gradients.
        names: linear layers.
        tokens_NT: calibration sequences.
        labels_NT: what the logits of each position should say, from `calibration.labels`.
        probes: random directions for each batch of sequences.
        seed: of the directions.

    Raises:
        NumericError: a second derivative is not finite.
    """
    model.requires_grad_(requires_grad=False)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
    sums, asked = [0.0] * len(names), int((labels_NT != IGNORED).sum())
    batches = zip(calibration.batches(tokens_NT), calibration.batches(labels_NT), strict=True)
    for number, (tokens_BT, labels_BT) in enumerate(batches):
        generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, number, _PURPOSE]).integers(2**62)))
        for index, value in enumerate(_quadratics(model, weights, tokens_BT, labels_BT, probes, generator)):
            sums[index] += value
    means = {n: s / (asked * w.numel()) for n, s, w in zip(names, sums, weights, strict=True)}
    for name, value in means.items():
        if not np.isfinite(value):
            raise NumericError(f"{name}: a second derivative on the calibration sequences is not finite")
    return means


def _quadratics(
    model: PreTrainedModel,
    weights: Sequence[torch.Tensor],
    tokens_BT: NDArray[np.int64],
    labels_BT: NDArray[np.int64],
    probes: int,
    generator: torch.Generator,
) -> list[float]:
    """Return the mean over probes of v^T H v for each weight, H being that of the summed loss of one batch."""
    device = weights[0].device
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits_BTV = model(input_ids=torch.from_numpy(tokens_BT).to(device)).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1),
        torch.from_numpy(labels_BT).to(device).flatten(),
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
