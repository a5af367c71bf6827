"""Scoring a model whose blocks are in memory one at a time: the same numbers as the whole model gives, to the last bit.

All text goes through a block before the next one is loaded. Bounded memory: one block, the parameters outside the
stack, the hidden states of the text, and the logits of one batch.

Shapes: B sequences of a batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.compression.base import Packed
from models.compression.modules import packed_linear
from pipelines.compression import calibration, sequential
from pipelines.compression.quick_eval import Floats, QuickEval
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.core import heap
from pipelines.measure import scoring
from pipelines.measure.windows import Batch
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader


class Stream:
    """Text on its way through the blocks of a model.

    Args:
        run: the base model of the compression, whose family says how blocks are called.
        model: of that family, parameters on the meta device.
        reader: its weights; those outside the stack are loaded here.
        calls: what the model is called with, batch by batch.
    """

    def __init__(
        self, run: CompressionRun, model: PreTrainedModel, reader: WeightReader, calls: Sequence[dict[str, Any]]
    ) -> None:
        self._run, self._model, self._reader, self._calls = run, model, reader, calls
        self._in_tuples = run.description.in_tuples
        self._stack, self._blocks = meta_init.blocks(model)
        meta_init.load_rest(model, self._stack, reader, run.device)
        model.tie_weights()
        self._hidden = [self._recorded(number)[0][0] for number in range(len(calls))]

    @classmethod
    def of_base(cls, run: CompressionRun, calls: Sequence[dict[str, Any]]) -> Self:
        """Return a stream through the base model of a run."""
        return cls(run, run.base, run.reader, calls)

    @classmethod
    def of_folder(cls, run: CompressionRun, folder: Path, calls: Sequence[dict[str, Any]]) -> Self:
        """Return a stream through a variant, as it is stored."""
        return cls(run, meta_init.build(folder), WeightReader(folder), calls)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Take all text through block `index`, whose parameters are loaded."""
        for number, hidden_BTD in enumerate(self._hidden):
            arguments = self._recorded(number)[index][1]  # made again: masks of all batches would take much memory
            self._hidden[number] = calibration.first_output(self._blocks[index](hidden_BTD, **arguments))

    def finish(self, packed: Mapping[str, Packed] | None = None) -> None:
        """Load block after block and take the text through; layers named in `packed` compute with what is there."""
        for index, block in enumerate(self._blocks):
            with _loaded(self._run, self._model, self._reader, f"{self._stack}.{index}", packed or {}):
                self.advance(index)
            meta_init.release(block)
            heap.trim()

    def _recorded(self, number: int) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return what the blocks are given of one batch."""
        call = {name: value for name, value in self._calls[number].items() if name != "logits_to_keep"}
        return calibration.record(self._model, self._blocks, call, in_tuples=self._in_tuples)

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """Return the logits of batch `number` [B, T, V], once every block is passed."""
        hidden_BTD = self._hidden[number]
        forwards: list[Callable[..., Tensor]] = [lambda *_args, **_kwargs: hidden_BTD] * len(self._blocks)
        with calibration.standing_in(self._blocks, forwards, in_tuples=self._in_tuples):
            logits_BTV: Tensor = self._model(**self._calls[number]).logits
        return logits_BTV


class TextStream:
    """The documents of a quick evaluation on their way through a model."""

    def __init__(self, text: QuickEval, stream: Callable[[Sequence[dict[str, Any]]], Stream]) -> None:
        self._text = text
        self.stream = stream([scoring.call_of(batch, text.family, str(text.device)) for batch in text.batches])

    def nats(self, name: str) -> Floats:
        """Return the summed negative log likelihood of each document [documents]; `name` is how errors call the model.

        Raises:
            NumericError: the model gives numbers that are not finite.
        """
        text = self._text

        def scored() -> Iterator[tuple[Batch, Tensor]]:
            for number, batch in enumerate(text.batches):
                yield batch, scoring.scored_logits(self.stream.logits(number), batch, text.family, name)

        return scoring.summed_nats(scored(), text.documents)


def base_nats(run: CompressionRun, text: QuickEval, name: str, packed: Mapping[str, Packed] | None = None) -> Floats:
    """Return the nats of each document under the base model, some of whose layers are compressed."""
    scored = TextStream(text, lambda calls: Stream.of_base(run, calls))
    scored.stream.finish(packed)
    return scored.nats(name)


def stored_nats(run: CompressionRun, text: QuickEval, name: str, folder: Path) -> Floats:
    """Return the nats of each document under a variant, as it is stored."""
    scored = TextStream(text, lambda calls: Stream.of_folder(run, folder, calls))
    scored.stream.finish()
    return scored.nats(name)


def compressed_nats(run: CompressionRun, text: QuickEval, name: str, assignment: Assignment) -> tuple[Floats, int]:
    """Return the nats of each document under the base as an assignment compresses it, and the bits of its layers.

    The variant is written nowhere: each block is scored while it is there.
    """
    scored, bits = TextStream(text, lambda calls: Stream.of_base(run, calls)), 0
    for index, block in enumerate(sequential.compress_blocks(run, assignment)):
        scored.stream.advance(index)
        bits += sum(layer.packed.stored_bits() for layer in block.values())
    return scored.nats(name), bits


@contextlib.contextmanager
def _loaded(
    run: CompressionRun, model: PreTrainedModel, reader: WeightReader, place: str, packed: Mapping[str, Packed]
) -> Iterator[None]:
    """Load one block; layers that round their inputs do so inside."""
    meta_init.load(model.get_submodule(place), place, reader, run.device, model.dtype)
    inside = [name for name in {*reader.rounding(), *packed} if name.startswith(f"{place}.")]
    originals: dict[str, nn.Module] = {name: model.get_submodule(name) for name in inside}
    for name in inside:
        packed_linear.put(model, name, packed[name] if name in set(packed) else reader.packed(name))
    yield
    for name, module in originals.items():
        model.set_submodule(name, module)
