"""A Llama whose attention reads keys and values from a quantized cache, when it generates and when it scores.

transformers hands its caches keys that are rotated already. Here attention hands over the keys as they leave the
projection, and rotates what comes back: positions are kept once for all layers, angles are computed anew. A pass
without a cache (evaluation, a prompt) codes and decodes its keys and values by the same functions row by row, so
scoring a text measures what generating it token by token would have seen.

Memory is what this saves; each step decodes the whole cache with plain tensor operations, so it is not faster.

Sequences of a batch that are padded on the left spend the exact first tokens on padding.

Shapes: B sequences, T tokens, H key heads, D head size, C = H * D; rows run over tokens, then sequences: N = T * B.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward, rotate_half

from models.architectures import transformers_internals
from models.compression.formats.cache_codes import Quantizer, Rows


@dataclass(frozen=True)
class Tables:
    """How one layer's cache is coded."""

    keys: Quantizer
    values: Quantizer
    exact_tokens: int
    rotated: bool = False
    """Whether keys are coded after RoPE, as one of the baselines has it; then `keys` was fitted on such keys."""


class QuantizedLayer(CacheLayerMixin):
    """The cache of one layer: the first tokens in float16, then rows of codes."""

    is_sliding = False
    is_croppable = True

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self._tables = tables
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._exact: list[Tensor] = []
        """float16 [t, B, C] of keys and of values."""
        self._rows: list[Rows] = []
        self._tokens = self._batch = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002 - both sides are alike
        """Take device and shape from the first states [B, H, T, D]."""
        self._tables = Tables(
            self._tables.keys.to(key_states.device),
            self._tables.values.to(key_states.device),
            self._tables.exact_tokens,
            self._tables.rotated,
        )
        self._batch, self._heads = key_states.shape[0], key_states.shape[1]
        empty = torch.zeros(0, self._batch, key_states.shape[1] * key_states.shape[3], device=key_states.device)
        self._exact = [empty.half(), empty.half()]
        self._rows = [self._tables.keys.encode(empty.flatten(0, 1)), self._tables.values.encode(empty.flatten(0, 1))]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys before RoPE and values [B, H, T, D], and return all that is stored, decoded, in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        kept = min(max(self._tables.exact_tokens - self._tokens, 0), new)
        for side, states in enumerate((key_states, value_states)):
            x_TBC = _rows_of(states)
            self._exact[side] = torch.cat([self._exact[side], x_TBC[:kept].half()])
            if kept < new:
                coded = self._quantizer(side).encode(x_TBC[kept:].flatten(0, 1))
                self._rows[side] = Rows.joined(self._rows[side], coded)
        self._tokens += new
        return self._decoded(0, key_states.dtype), self._decoded(1, value_states.dtype)

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a query of this length meets."""
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; `tokens_to_remove` is their number, negative or 0, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove; got {tokens_to_remove}")
        self._pick(max(self._tokens + tokens_to_remove, 0), torch.arange(self._batch))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the sequences for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._pick(self._tokens, torch.arange(self._batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._pick(self._tokens, torch.arange(self._batch).repeat_interleave(repeats))

    @property
    def stored_bytes(self) -> int:
        """Size of what is stored for the cached tokens; the tables are part of the model."""
        return sum(t.numel() * t.element_size() for t in self._exact) + self.coded_bytes

    @property
    def coded_bytes(self) -> int:
        """Size of the rows of codes; the rest of what is stored is the same for every method."""
        return sum(rows.bytes for rows in self._rows)

    def _pick(self, tokens: int, sequences_B: Tensor) -> None:
        """Keep the first `tokens` of the named sequences."""
        if not self.is_initialized:
            return
        sequences_B = sequences_B.to(self._exact[0].device)
        self._exact = [exact[:tokens, sequences_B] for exact in self._exact]
        coded = max(tokens - self._tables.exact_tokens, 0)
        index = torch.arange(coded, device=sequences_B.device).unsqueeze(1) * self._batch + sequences_B
        self._rows = [rows.take(index.flatten()) for rows in self._rows]
        self._tokens, self._batch = tokens, len(sequences_B)

    def _quantizer(self, side: int) -> Quantizer:
        return self._tables.values if side else self._tables.keys

    def _decoded(self, side: int, dtype: torch.dtype) -> Tensor:
        coded = self._quantizer(side).decode(self._rows[side]).unflatten(0, (-1, self._batch))
        x_TBC = torch.cat([self._exact[side].to(dtype), coded.to(dtype)])
        return x_TBC.unflatten(2, (self._heads, -1)).permute(1, 2, 0, 3).contiguous()


class QuantizedCache(Cache):
    """One `QuantizedLayer` a layer, and the positions of the cached tokens, which all layers share."""

    def __init__(self, tables: Sequence[Tables], rotary: nn.Module) -> None:
        super().__init__(layers=[QuantizedLayer(table) for table in tables])
        self._rotary = rotary
        self._positions_BT: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def angles(self, position_ids: Tensor, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, T, D] of all cached tokens and the new ones.

        Args:
            position_ids: positions of the new tokens [B or 1, t].
            layer: the first layer of a pass adds the new positions; the others read what it computed.
            like: states whose batch, device and dtype count.
        """
        if layer == 0:
            new_BT = position_ids.to(torch.int32).expand(like.shape[0], -1)
            known = self._positions_BT
            self._positions_BT = new_BT if known is None else torch.cat([known, new_BT], 1)
            self._angles = self._rotary(like, self._positions_BT.long())
        assert self._angles is not None
        return self._angles

    def finished(self, layer: int) -> None:
        """Forget the angles when the last layer has used them."""
        if layer == len(self.layers) - 1:
            self._angles = None

    @property
    def stored_bytes(self) -> int:
        """Size of what is stored for the cached tokens."""
        positions = 0 if self._positions_BT is None else 4 * self._positions_BT.numel()
        return positions + sum(layer.stored_bytes for layer in self.layers)

    @property
    def coded_bytes(self) -> int:
        """Size of the codes alone: without exact tokens and positions."""
        return sum(layer.coded_bytes for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens."""
        super().crop(tokens_to_remove)
        if self._positions_BT is not None:
            self._positions_BT = self._positions_BT[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._positions_BT = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the sequences for beam search."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        if self._positions_BT is not None:
            self._positions_BT = self._positions_BT.repeat_interleave(repeats, 0)

    def _select(self, indices: Tensor) -> None:
        if self._positions_BT is not None:
            self._positions_BT = self._positions_BT[indices.to(self._positions_BT.device)]


_READ = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling", "config")
"""Attributes of `LlamaAttention` that `QuantizedCacheAttention` computes with."""


class QuantizedCacheAttention(LlamaAttention):
    """Llama attention over decoded keys and values; made from a `LlamaAttention` by `attach`."""

    tables: Tables

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend from [B, T, width] to all cached tokens and the new ones; returns [B, T, width] and the weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles, rotated = position_embeddings, self.tables.rotated
        if rotated:
            key = rotate(key, position_embeddings)
        if past_key_values is None:
            keys, values = QuantizedLayer(self.tables).update(key, value)
        elif isinstance(past_key_values, QuantizedCache):
            angles = past_key_values.angles(kwargs["position_ids"], self.layer_idx, key)
            keys, values = past_key_values.update(key, value, self.layer_idx)
            past_key_values.finished(self.layer_idx)
        else:
            raise TypeError(f"this model needs the cache that its `new_cache()` makes; got {type(past_key_values)}")
        attend = transformers_internals.attention_function(self.config, eager_attention_forward)
        output, weights = attend(
            self,
            rotate(query, position_embeddings),
            keys if rotated else rotate(keys, angles),
            values,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class QuantizedCacheLlama(LlamaForCausalLM):
    """A `LlamaForCausalLM` that makes its own caches; made by `attach`."""

    def new_cache(self) -> QuantizedCache:
        """Return an empty cache."""
        tables = [layer.self_attn.tables for layer in self.model.layers]
        return QuantizedCache(tables, self.model.rotary_emb)

    @functools.wraps(LlamaForCausalLM.forward)  # `generate` reads the signature
    def forward(self, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        """Run the model; where transformers would make a cache, this makes its own."""
        use_cache = kwargs.get("use_cache")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = self.new_cache()
        return super().forward(*args, past_key_values=past_key_values, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)


def attach(model: PreTrainedModel, tables: Sequence[Tables]) -> QuantizedCacheLlama:
    """Make `model` use quantized caches from now on, in place: its weights stay where and how they are.

    Raises:
        ValueError: it is no plain Llama decoder; keys and values have other places in every other family.
        NotImplementedError: Llama's attention is another one in the installed transformers.
    """
    if type(model) is not LlamaForCausalLM:
        raise ValueError(f"kvquant quantizes the cache of LlamaForCausalLM; {type(model).__name__} is another family")
    for layer, table in zip(model.model.layers, tables, strict=True):
        transformers_internals.become(layer.self_attn, QuantizedCacheAttention, _READ, overrides=("forward",))
        layer.self_attn.tables = table
    transformers_internals.become(
        model, QuantizedCacheLlama, ("model", "config"), overrides=("forward", "_prepare_cache_for_generation")
    )
    return model


def _rows_of(states_BHTD: Tensor) -> Tensor:
    """Return [T, B, C]."""
    return states_BHTD.permute(2, 0, 1, 3).flatten(2)


def rotate(x_BHTD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE, given cosines and sines [B, T, D]."""
    cosine, sine = (part.unsqueeze(1) for part in angles)
    return x_BHTD * cosine + rotate_half(x_BHTD) * sine
