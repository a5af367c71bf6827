"""Documents that share a packed sequence are kept apart: no token attends to another document's.

Where a document begins can be read from the tokens (`pipelines.data.packing` writes them so): at the start of the
sequence, at every start token, and behind padding. From there on positions count from zero, and attention stays inside
of the document. A document then means the same in every company: replacing its neighbours changes nothing of it, to the
last bit. (Restarted `position_ids` alone make transformers do this for Llama only, and make a GPU wait for the host in
every forward pass to see whether there is a boundary: `transformers.masking_utils.find_packed_sequence_indices`.)

Legend: B sequences, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
else:
    torch = lazy_module("torch")


def starts(tokens_BT: Any, *, bos_id: int, pad_id: int) -> Any:
    """Return where a document, the next part of one, or padding begins: bool [B, T], an array or a tensor as given."""
    padding_BT = tokens_BT == pad_id
    starts_BT = tokens_BT == bos_id
    starts_BT[:, 0] = True
    starts_BT[:, 1:] |= padding_BT[:, 1:] != padding_BT[:, :-1]
    return starts_BT


def positions(starts_BT: Tensor) -> Tensor:
    """Return the place of each token in its document, int64 [B, T]."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values


def masks(starts_BT: Tensor, window: int | None) -> Tensor | dict[str, Tensor]:
    """Return which token may attend to which, bool [B, 1, T, T]: itself and what stands before it in its document.

    Args:
        starts_BT: where documents begin.
        window: None for a decoder. For an encoder, in which tokens look both ways, how far the layers with local
            attention look: there is one mask for these and one for the others, by the names that transformers has.
    """
    number_BT = starts_BT.cumsum(dim=1)
    same_B1TT = (number_BT[:, :, None] == number_BT[:, None, :])[:, None]
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    distance_TT = index_T[:, None] - index_T[None, :]
    if window is None:
        return same_B1TT & (distance_TT >= 0)
    return {"full_attention": same_B1TT, "sliding_attention": same_B1TT & (distance_TT.abs() <= window)}


def keep_apart(model: nn.Module, *, bos_id: int, pad_id: int) -> RemovableHandle:
    """Let a model read packed sequences document by document, until the handle is removed.

    It changes forward passes that are given tokens only: with a cache, positions or a mask the caller has said what is
    to be seen.

    Args:
        model: a decoder or encoder of transformers with its output layer.
        bos_id: token that starts a document.
        pad_id: token that fills a sequence.
    """
    body: nn.Module = cast("Any", model).model
    return body.register_forward_pre_hook(_Boundaries(bos_id, pad_id), with_kwargs=True)


_SAYS_MORE = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


@dataclass(frozen=True)
class _Boundaries:
    """Gives the layers of a model positions and masks beside the tokens."""

    bos_id: int
    pad_id: int

    def __call__(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens_BT = kwargs.get("input_ids")
        if tokens_BT is None or args or any(kwargs.get(name) not in (None, False) for name in _SAYS_MORE):
            return args, kwargs
        starts_BT = starts(tokens_BT, bos_id=self.bos_id, pad_id=self.pad_id)
        added: dict[str, Any] = {"position_ids": positions(starts_BT)}
        # Decoders of other layouts may have windows: transformers makes their masks, from the positions.
        if body.config.model_type in ("llama", "modernbert"):
            window = body.config.sliding_window if body.config.model_type == "modernbert" else None
            added["attention_mask"] = masks(starts_BT, window)
        return args, {**kwargs, **added}
