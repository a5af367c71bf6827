"""Activation checkpointing: layers compute again in the backward pass what they did not keep of the forward pass.

What is computed again is computed by the same operations on the same numbers, so gradients are equal to the last bit.
It is the form without re-entrance (`use_reentrant = False`): parameters get gradients also where no input of a layer
needs one, as below the lowest layer that LISA trains.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Kept = Literal["none", "selective", "full"]
"""What is left out: nothing; what is cheap to compute again; everything but the input of each layer."""

_PRODUCTS = ("mm", "addmm", "bmm")
_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_DEAR = {
    getattr(torch.ops.aten, name).default
    for name in (*_PRODUCTS, *(f"_scaled_dot_product_{kernel}" for kernel in _ATTENTION))
}
"""Matrix products and attention: most of a layer's time, and less than half of its memory."""


def checkpoint_activations(model: PreTrainedModel, kind: Kept) -> None:
    """Let the layers of a model keep less for the backward pass, while it is in training mode.

    Args:
        model: a model of transformers.
        kind: `selective` keeps the results of matrix products and attention, `full` the input of each layer only.

    Raises:
        ValueError: the model's family has no layers that can be computed again.
    """
    if kind == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(settings)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
