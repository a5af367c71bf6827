"""What calibration shows a model, and what it records at the inputs of each layer of one block.

A packed sequence is cut where its documents begin, as training reads it (`models.architectures.documents`), and a model
is shown each part by itself: whatever its family, no token meets another document's, positions count from zero, and
padding is shown to nobody. Parts of one length make a batch.

Everything stays on the device of the block. Bounded memory: one block, the hidden states of the calibration sequences
(twice where the original model is followed too), and for each layer of the block one I x I matrix and, on request, two
samples of at most `ROWS` rows.
Shapes: N packed sequences, T tokens, B parts of a batch, L tokens of each of them, D width, I input features, R sampled
rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import documents
from models.architectures.config import IGNORED
from models.compression.base import Statistics
from models.objectives.causal import next_tokens
from pipelines.core.errors import IntegrityError, NumericError
from pipelines.data.shards import ShardReader
from pipelines.modelio import meta_init

ROWS = 2048
"""Input rows of a layer that methods with `calibration = "inputs"` are shown; fewer where there are fewer tokens."""
_BATCH = 8
"""A batch has at most as many tokens as so many packed sequences."""
_CACHE = frozenset({"past_key_values", "use_cache"})
"""Arguments of blocks that are left out."""
_PURPOSE = 0xC0
"""Sets the random stream of calibration apart from others with the same seed."""
_HIDDEN_SHARE = 0.3
"""Share of tokens that an encoder sees masked, near the middle of what masked language models train with."""


@dataclass(frozen=True)
class Batch:
    """Parts of documents that are equally long."""

    tokens_BL: NDArray[np.int64]
    """As the model sees them."""
    labels_BL: NDArray[np.int64]
    """What the logits of each position should say, or `IGNORED`."""


@dataclass
class Prefix:
    """The state of the model between two blocks: hidden states, and what every block is called with besides them."""

    hidden: list[Tensor]
    """Of every batch [B, L, D]."""
    arguments: Callable[[int], Sequence[dict[str, Any]]]
    """Number of a batch -> keyword arguments of each block: masks, position embeddings. They are made again whenever
    they are asked for: masks of all batches together would be larger than the hidden states."""
    batch_tokens: int = 0
    """Tokens that are computed at a time, at least those of the largest batch."""

    def fork(self) -> Prefix:
        """Return a second stream that starts from the same hidden states."""
        return replace(self, hidden=list(self.hidden))

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of each batch."""
        return [hidden_BLD.shape[0] * hidden_BLD.shape[1] for hidden_BLD in self.hidden]

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(self.sizes)

    @torch.no_grad()
    def outputs(self, index: int, block: nn.Module) -> Iterator[Tensor]:
        """Yield the outputs of block `index`, batch by batch."""
        for number in range(len(self.hidden)):
            yield self.output(index, block, number)

    def output(self, index: int, block: nn.Module, number: int) -> Tensor:
        """Return the output [B, L, D] of block `index` for one batch."""
        arguments = self.arguments(number)[index]
        return first_output(block(self.hidden[number], **arguments))

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of block `index`."""
        for number, output_BLD in enumerate(self.outputs(index, block)):
            self.hidden[number] = output_BLD

    def groups(self) -> list[list[int]]:
        """Return which batches are learned from together: of all lengths, and about `batch_tokens` tokens."""
        count = max(1, self.tokens // max(self.batch_tokens, *self.sizes))
        return [list(range(start, len(self.hidden), count)) for start in range(count)]


def sample_tokens(prepare: Path, *, samples: int, seed: int, masked: bool, split: str = "train") -> NDArray[np.int64]:
    """Return N sequences [N, T] of a split, a pure function of the seed; fewer when the split holds fewer.

    Args:
        prepare: folder of a prepare artifact.
        samples: how many sequences.
        seed: seed of the choice.
        masked: hide a share of the tokens behind the mask token, as an encoder was trained to see them.
        split: train for calibration, validation for choices among variants.

    Raises:
        IntegrityError: the split is empty.
    """
    reader = ShardReader(prepare, split)
    if not len(reader):
        raise IntegrityError(f"{prepare}: the {split} split is empty, so there is nothing to calibrate on")
    generator = np.random.default_rng([seed, _PURPOSE])
    tokens_NT = reader.take(np.sort(generator.choice(len(reader), size=min(samples, len(reader)), replace=False)))
    if masked:
        special = [reader.index[key] for key in ("bos_id", "eos_id", "pad_id", "mask_id")]
        hidden = (generator.random(tokens_NT.shape) < _HIDDEN_SHARE) & ~np.isin(tokens_NT, special)
        tokens_NT = np.where(hidden, reader.index["mask_id"], tokens_NT)
    return tokens_NT


def labels(
    prepare: Path, tokens_NT: NDArray[np.int64], *, seed: int, masked: bool, split: str = "train"
) -> NDArray[np.int64]:
    """Return what the logits of each position of `tokens_NT` should say [N, T], `IGNORED` where nothing is asked.

    A decoder is asked for the next token, an encoder for the tokens that `sample_tokens` hid from it.
    """
    if masked:
        plain_NT = sample_tokens(prepare, samples=len(tokens_NT), seed=seed, masked=False, split=split)
        return np.where(plain_NT != tokens_NT, plain_NT, IGNORED)
    index = ShardReader(prepare, split).index
    return next_tokens(tokens_NT, bos_id=index["bos_id"], pad_id=index["pad_id"])


def boundaries(prepare: Path) -> dict[str, int]:
    """Return the tokens that tell where documents begin, as `models.architectures.documents` takes them."""
    index = ShardReader(prepare, "train").index
    return {"bos_id": index["bos_id"], "pad_id": index["pad_id"]}


def batches(
    prepare: Path, tokens_NT: NDArray[np.int64], labels_NT: NDArray[np.int64], *, sequences: int = _BATCH
) -> list[Batch]:
    """Cut packed sequences into the parts of documents in them; every token but padding is in one part.

    Args:
        prepare: folder of a prepare artifact, which knows the special tokens.
        tokens_NT: from `sample_tokens`.
        labels_NT: from `labels`.
        sequences: a batch has at most as many tokens as so many packed sequences.

    Returns:
        Batches of parts of one length, the shortest first; parts in the order of the sequences.
    """
    special = boundaries(prepare)
    flat, limit = tokens_NT.reshape(-1), sequences * tokens_NT.shape[1]
    begins = np.flatnonzero(documents.starts(tokens_NT, **special))
    lengths = np.diff(begins, append=len(flat))
    text = flat[begins] != special["pad_id"]
    cut: list[Batch] = []
    for length in np.unique(lengths[text]):
        places_PL = begins[text & (lengths == length)][:, None] + np.arange(length)
        for start in range(0, len(places_PL), max(limit // length, 1)):
            places_BL = places_PL[start : start + max(limit // length, 1)]
            cut.append(Batch(flat[places_BL], labels_NT.reshape(-1)[places_BL]))
    return cut


def enter(
    model: PreTrainedModel,
    stack: nn.ModuleList,
    text: Sequence[Batch],
    device: torch.device,
    *,
    in_tuples: bool = False,
) -> Prefix:
    """Return the hidden states in front of the first block, and the arguments that each block is given.

    Only the parameters outside the stack are used.
    """

    def recorded(number: int) -> list[tuple[Tensor, dict[str, Any]]]:
        ids_BL = torch.from_numpy(text[number].tokens_BL).to(device)
        return record(model, stack, {"input_ids": ids_BL}, in_tuples=in_tuples)

    hidden = [recorded(number)[0][0] for number in range(len(text))]
    tokens = max(batch.tokens_BL.size for batch in text)
    return Prefix(hidden, lambda number: [others for _, others in recorded(number)], tokens)


@torch.no_grad()
def record(
    model: PreTrainedModel, stack: nn.ModuleList, call: Mapping[str, Any], *, in_tuples: bool
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return what each block is given: hidden states [B, L, D] as they enter the first, and its other arguments.

    Every block is stood in for by a recorder that passes its input on, so a model whose layers differ in masks or
    positions is recorded as it is.

    Args:
        model: with the parameters outside the stack loaded.
        stack: its blocks.
        call: what the model without its head is called with.
        in_tuples: whether blocks give back tuples.
    """
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def recording(block: nn.Module) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden_BLD, others = meta_init.bound(block, args, kwargs)
            seen.append((hidden_BLD, {k: v for k, v in others.items() if k not in _CACHE}))
            return hidden_BLD

        return forward

    with standing_in(stack, [recording(block) for block in stack], in_tuples=in_tuples):
        model.base_model(**call)
    return seen


@contextlib.contextmanager
def standing_in(
    blocks: nn.ModuleList, forwards: Sequence[Callable[..., Tensor]], *, in_tuples: bool = False
) -> Iterator[None]:
    """Let each block compute one of `forwards` instead of what it does; `in_tuples` where blocks give back tuples."""
    originals = [block.forward for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = _in_tuple(forward) if in_tuples else forward
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.forward = original


def _in_tuple(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *args, **kwargs: (forward(*args, **kwargs),)


def linear_layers(model: PreTrainedModel, place: str, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return those of the layers `names` that are in the block called `place`, by their whole name."""
    inside = {name: model.get_submodule(name) for name in names if name.startswith(f"{place}.")}
    return {name: module for name, module in inside.items() if isinstance(module, nn.Linear)}


def measure(
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    index: int,
    prefix: Prefix,
    *,
    rows_R: NDArray[np.int64] | None = None,
    original: Prefix | None = None,
) -> dict[str, Statistics]:
    """Return the input statistics of `layers` (name -> module of the block) over all calibration tokens.

    Args:
        block: block `index` with its original weights.
        layers: what is measured.
        index: place of the block in the stack.
        prefix: hidden states behind the compressed blocks.
        rows_R: calibration tokens whose input rows are kept; None keeps none.
        original: hidden states behind the original blocks; given with `rows_R`, it is advanced past this block, and the
            same rows are kept from it as `reference_NI`.

    Raises:
        NumericError: an activation is not finite.
    """
    sums = {
        name: torch.zeros(module.in_features, module.in_features, dtype=torch.float64, device=module.weight.device)
        for name, module in layers.items()
    }
    highest = {
        name: torch.zeros(module.in_features, dtype=torch.float32, device=module.weight.device)
        for name, module in layers.items()
    }
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    reference: dict[str, list[Tensor]] = {name: [] for name in layers}
    with (
        _listening(layers, lambda name: _accumulate(sums[name], highest[name])),
        _keeping(layers, rows_R, prefix, inputs),
    ):
        for _ in prefix.outputs(index, block):
            pass
    for name, hessian_II in sums.items():
        if not bool(torch.isfinite(hessian_II).all()):
            raise NumericError(f"{name}: calibration met activations that are not finite")
    if original is not None:
        with _keeping(layers, rows_R, original, reference):
            original.advance(index, block)
    return {
        name: Statistics(
            hessian_II,
            prefix.tokens,
            inputs_NI=_joined(inputs[name]),
            reference_NI=_joined(reference[name]),
            highest_I=highest[name],
        )
        for name, hessian_II in sums.items()
    }


def sample_rows(tokens: int, limit: int = ROWS) -> NDArray[np.int64]:
    """Return which of `tokens` calibration tokens are kept as rows: at most `limit`, increasing, always the same."""
    generator = np.random.default_rng([tokens, limit, _PURPOSE])
    return np.sort(generator.choice(tokens, size=min(tokens, limit), replace=False))


def _keeping(
    layers: Mapping[str, nn.Linear], rows_R: NDArray[np.int64] | None, prefix: Prefix, kept: dict[str, list[Tensor]]
) -> contextlib.AbstractContextManager[None]:
    """Append to `kept` what each layer meets of the tokens `rows_R`, batch by batch."""
    if rows_R is None:
        return contextlib.nullcontext()
    ends = np.cumsum(prefix.sizes)

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            number = len(kept[name])
            start, end = ends[number] - prefix.sizes[number], ends[number]
            mine = rows_R[(rows_R >= start) & (rows_R < end)] - start
            rows_NI = inputs[0].detach().flatten(0, -2)
            kept[name].append(rows_NI[torch.from_numpy(mine).to(rows_NI.device)].float())

        return hook

    return _listening(layers, keep)


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


@contextlib.contextmanager
def _listening(layers: Mapping[str, nn.Linear], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Call `hook(name)` of every layer with its inputs inside the block."""
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _accumulate(sum_II: Tensor, highest_I: Tensor) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows_NI = inputs[0].detach().flatten(0, -2)
        torch.maximum(highest_I, rows_NI.abs().amax(0).float(), out=highest_I)
        rows_NI = rows_NI.double()
        sum_II.add_(rows_NI.T @ rows_NI)

    return hook


def first_output(output: Any) -> Tensor:
    """Return the hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple) else output
