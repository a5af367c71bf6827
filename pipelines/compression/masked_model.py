"""A model with some units switched off, as structured methods see it: losses and feature trajectories.

A unit is switched off by zeroing its columns in front of the matrix that reads it, which is the same function as
cutting it out. The whole model is held in memory, on its device; blocks in front of the one measured are not computed
again.

Shapes: N sequences, B sequences of a batch, T tokens, K sampled tokens, D width, V vocabulary, U units.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import documents
from models.compression.solvers.structured import Structure
from pipelines.compression.calibration import first_output, standing_in
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init

_BATCH = 8
_FEATURE_SEQUENCES = 8
"""Sequences whose trajectories are compared."""
_FEATURE_TOKENS = 256
"""Tokens sampled from them, evenly."""


@dataclass(frozen=True)
class Unit:
    """Where the units of one kind are in a block."""

    reads: str
    """Matrix whose input columns belong to units."""
    writes: Mapping[str, int]
    """Matrices whose output rows belong to units -> how often the units follow one another in them."""


UNITS: dict[str, dict[str, Unit]] = {
    "llama": {
        "groups": Unit("self_attn.o_proj", {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1}),
        "neurons": Unit("mlp.down_proj", {"mlp.gate_proj": 1, "mlp.up_proj": 1}),
    },
    # ModernBERT takes the head size from width / heads, so heads cannot go; gate and input lie in one matrix.
    "modernbert": {"neurons": Unit("mlp.Wo", {"mlp.Wi": 2})},
}
"""Model type -> what can be cut from its blocks."""


class MaskedTransformer:
    """`models.compression.solvers.structured.MaskedModel` over a loaded model.

    Args:
        model: a model of one of the types in `UNITS`.
        tokens_NT: calibration sequences as the model sees them.
        labels_NT: what the logits should say, from `calibration.labels`.
        bos_id: token that starts a document: documents of a sequence are kept apart, as in training.
        pad_id: token that fills a sequence.

    Raises:
        ConfigError: another type, which is named.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens_NT: NDArray[np.int64],
        labels_NT: NDArray[np.int64],
        *,
        bos_id: int,
        pad_id: int,
    ) -> None:
        self.model, self.units = model, units_of(model)
        self._apart = functools.partial(documents.keep_apart, model, bos_id=bos_id, pad_id=pad_id)
        self._tokens_NT = torch.from_numpy(tokens_NT).to(model.device)
        self._labels_NT = torch.from_numpy(labels_NT).to(model.device)
        self._blocks = meta_init.blocks(model)[1]
        config = model.config
        self.layers, self.neurons = config.num_hidden_layers, config.intermediate_size
        self.groups = config.num_key_value_heads if "groups" in self.units else 0
        each = config.num_attention_heads // max(self.groups, 1)
        counts = [n for n in range(1, self.groups + 1) if config.hidden_size % (n * each) == 0]
        self.loadable_groups: Sequence[int] = counts or [0]
        costs = {"groups": self._cost("groups", self.groups), "neurons": self._cost("neurons", self.neurons)}
        self.costs: Mapping[str, int] = costs
        self._entries: list[Tensor] = []
        self._originals: dict[int, tuple[list[Tensor], Tensor]] = {}

    @torch.no_grad()
    def losses(self, structure: Structure | None) -> Tensor:
        """Return the mean loss of every sequence [N], nats a token; None switches nothing off."""
        losses = []
        with self.without(structure), self._apart():
            for ids_BT, labels_BT in zip(self._tokens_NT.split(_BATCH), self._labels_NT.split(_BATCH), strict=True):
                logits_BTV = self.model(input_ids=ids_BT).logits.float()
                loss_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
                losses.append(loss_BT.sum(1) / (labels_BT >= 0).sum(1).clamp(min=1))
        return torch.cat(losses)

    def loss(self, structure: Structure) -> float:
        """Return the mean calibration loss."""
        return float(self.losses(structure).mean())

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the summed squared weights of every unit."""
        counts = {"groups": self.groups, "neurons": self.neurons}
        return {
            kind: torch.stack([self._magnitude(block, kind, count) for block in self._blocks])
            for kind, count in counts.items()
        }

    @torch.no_grad()
    def original(self, layer: int) -> tuple[Sequence[Tensor], Tensor]:
        """Return features behind block `layer` and later ones [K, D], and logits [K, V], of the whole model."""
        if not self._originals:
            features, logits = self._trajectory(0, self._entries)
            self._originals = {place: (features[place:], logits) for place in range(self.layers)}
        return self._originals[layer]

    @torch.no_grad()
    def trajectory(self, layer: int, kind: str, removed: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return the same when the units `removed` [U] of one block are switched off."""
        self.original(layer)
        # The blocks before pass on what the whole model gave them, instead of computing.
        before = [_constant(entry) for entry in self._entries[1 : layer + 1]]
        with self._switched(layer, kind, ~removed), standing_in(self._blocks[:layer], before):
            return self._trajectory(layer, [])

    @contextlib.contextmanager
    def without(self, structure: Structure | None) -> Iterator[None]:
        """Switch off what a structure does not keep; None switches nothing off."""
        with contextlib.ExitStack() as stack:
            if structure is not None:
                for kind in self.units:
                    for layer, mask in enumerate(structure.masks(kind)):
                        stack.enter_context(self._switched(layer, kind, mask))
            yield

    def _trajectory(self, layer: int, entries: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        features: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _m, inputs: entries.append(inputs[0].detach()))
            for block in self._blocks
        ] + [
            block.register_forward_hook(lambda _m, _i, out: features.append(first_output(out)))
            for block in self._blocks
        ]
        try:
            with self._apart():
                logits = self.model(input_ids=self._tokens_NT[:_FEATURE_SEQUENCES]).logits
        finally:
            for hook in hooks:
                hook.remove()
        return [_sampled(x) for x in features[layer:]], _sampled(logits)

    def _magnitude(self, block: nn.Module, kind: str, count: int) -> Tensor:
        if count == 0:
            return torch.zeros(0, device=self.model.device)
        unit = self.units[kind]
        columns = _weight(block, unit.reads).square().sum(0).view(count, -1).sum(1)
        rows = [
            _weight(block, n).square().sum(1).view(often, count, -1).sum((0, 2)) for n, often in unit.writes.items()
        ]
        return columns + torch.stack(rows).sum(0)

    def _cost(self, kind: str, count: int) -> int:
        """Return the weights of one unit, each of which is multiplied once for each token."""
        if count == 0:
            return 0
        unit, block = self.units[kind], self._blocks[0]
        return sum(block.get_parameter(f"{name}.weight").numel() for name in (unit.reads, *unit.writes)) // count

    @contextlib.contextmanager
    def _switched(self, layer: int, kind: str, kept_U: Tensor) -> Iterator[None]:
        """Zero the columns of the units that are not kept."""
        reader = self._blocks[layer].get_submodule(self.units[kind].reads)
        assert isinstance(reader, nn.Linear)
        columns = kept_U.repeat_interleave(reader.in_features // len(kept_U)).to(reader.weight)
        hook = reader.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * columns, *inputs[1:]))
        try:
            yield
        finally:
            hook.remove()


def units_of(model: PreTrainedModel) -> Mapping[str, Unit]:
    """Return what can be cut from a model.

    Raises:
        ConfigError: nothing is known about its type.
    """
    if model.config.model_type not in UNITS:
        raise ConfigError(
            f"structured pruning knows the layouts {', '.join(UNITS)}; {type(model).__name__} has another"
        )
    return UNITS[model.config.model_type]


def _constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: value


def _weight(block: nn.Module, name: str) -> Tensor:
    return block.get_parameter(f"{name}.weight").detach().float()


def _sampled(x_BTD: Tensor) -> Tensor:
    rows = x_BTD.detach().flatten(0, 1).float()
    return rows[:: max(1, len(rows) // _FEATURE_TOKENS)]
