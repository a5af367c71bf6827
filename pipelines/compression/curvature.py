"""Curvature of the parent's loss along each layer: the mean of the diagonal of its Hessian, by Hutchinson's estimate.

For Rademacher v, E[v^T H v] = tr H. One backward pass through the gradient gives H v for all layers at once; what one
layer's v sees of another's averages out. Every batch of calibration sequences draws its own probes.
The whole model and the graph of two backward passes of one batch are in memory; `gradients` needs far less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from pipelines.compression import calibration
from pipelines.core.errors import NumericError
from pipelines.modelio.load import load_model

_PURPOSE = 0x4C


def traces(
    folder: Path,
    names: Sequence[str],
    tokens_NT: NDArray[np.int64],
    labels_NT: NDArray[np.int64],
    *,
    probes: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Return tr(H_i) / n_i of each layer: the mean second derivative of the mean loss, below zero where noise rules.

    Args:
        folder: the parent's model folder.
        names: linear layers.
        tokens_NT: calibration sequences.
        labels_NT: what the logits of each position should say, from `calibration.labels`.
        probes: random directions for each batch of sequences.
        seed: of the directions.
        device: where to compute.

    Raises:
        NumericError: a second derivative is not finite.
    """
    model = load_model(folder).to(device).requires_grad_(requires_grad=False)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
    sums, asked = [0.0] * len(names), int((labels_NT != calibration.IGNORED).sum())
    batches = zip(calibration.batches(tokens_NT), calibration.batches(labels_NT), strict=True)
    for number, (tokens_BT, labels_BT) in enumerate(batches):
        generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, number, _PURPOSE]).integers(2**62)))
        for index, value in enumerate(_quadratics(model, weights, tokens_BT, labels_BT, probes, generator)):
            sums[index] += value
    found = {n: s / (asked * w.numel()) for n, s, w in zip(names, sums, weights, strict=True)}
    for name, value in found.items():
        if not np.isfinite(value):
            raise NumericError(f"{name}: a second derivative on the calibration sequences is not finite")
    return found


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
        ignore_index=calibration.IGNORED,
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
