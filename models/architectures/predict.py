"""From tokens to logits and losses, the same for decoder and encoder.

Legend: B sequences, T tokens, N targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.architectures.config import IGNORED


def stack(model: nn.Module) -> nn.ModuleList:
    """Return the transformer layers of a model."""
    layers: nn.ModuleList = cast("Any", model).model.layers
    return layers


def final_norm(model: nn.Module) -> nn.Module:
    """Return the normalisation between the last layer and the head."""
    body = cast("Any", model).model
    norm: nn.Module = body.norm if hasattr(body, "norm") else body.final_norm
    return norm


def hidden_states(model: nn.Module, inputs_BT: Tensor) -> Tensor:
    """Return the normalised output of the last layer [B, T, D]."""
    states_BTD: Tensor = cast("Any", model).model(input_ids=inputs_BT).last_hidden_state
    return states_BTD


def layer_outputs(model: nn.Module, inputs_BT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the output [B, T, D] of every layer, not normalised, and the normalised output of the last one."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in stack(model)]
    try:
        last_BTD = hidden_states(model, inputs_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, last_BTD


def logits(model: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Return the logits [N, V] of normalised hidden states."""
    known = cast("Any", model)
    return known.lm_head(hidden_ND) if hasattr(known, "lm_head") else known.decoder(known.head(hidden_ND))


def greedy(model: nn.Module, prompt_BT: Tensor, count: int) -> Tensor:
    """Return the `count` tokens [B, count] that a decoder finds likeliest one after the other.

    It takes as many passes whatever comes out: under ZeRO-3 every rank must take as many as the others.
    """
    body, given_BT, cache, tokens = cast("Any", model).model, prompt_BT, None, list[Tensor]()
    for _ in range(count):
        output = body(input_ids=given_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        given_BT = logits(model, output.last_hidden_state[:, -1:]).argmax(dim=-1)
        tokens.append(given_BT)
    return torch.cat(tokens, dim=1)


def filled_in(model: nn.Module, inputs_BT: Tensor, mask_id: int) -> Tensor:
    """Return inputs [B, T] with the token that an encoder finds likeliest in place of every mask."""
    mask_BT = inputs_BT == mask_id
    guesses_N = logits(model, hidden_states(model, inputs_BT)[mask_BT]).argmax(dim=-1)
    return inputs_BT.masked_scatter(mask_BT, guesses_N)


def summed_nats(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed cross entropy in float32; `IGNORED` targets add nothing."""
    return functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")


def language_nats(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, chunk: int | None = None) -> Tensor:
    """Return the summed nats of a micro batch, float32 scalar.

    Logits are computed for targets only: the encoder is asked for a third of its positions, and the output matrix is
    most of the arithmetic of a small model.

    Args:
        model: a decoder or an encoder with its output layer.
        inputs_BT: tokens that the model sees.
        targets_BT: tokens to predict, or `IGNORED`.
        chunk: targets whose logits are held at a time; each chunk's are computed again in the backward pass, so that
            N x V logits are never in memory. None: all at once.
    """
    label_mask_BT = targets_BT != IGNORED
    hidden_ND, targets_N = hidden_states(model, inputs_BT)[label_mask_BT], targets_BT[label_mask_BT]
    if chunk is None or len(targets_N) <= chunk:
        return _nats(model, hidden_ND, targets_N)
    parts = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    losses = [checkpoint(_nats, model, hidden, targets, use_reentrant=False) for hidden, targets in parts]
    return torch.stack(losses).sum()


def _nats(model: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return summed_nats(logits(model, hidden_ND), targets_N)
