"""The search for the smallest variant within a budget: one compress stage that tries methods and widths inside.

The graph of a run is static, so the candidates are no nodes of it: they are built in the scratch folder, measured on
the *validation* split and thrown away, and the winner is built again as the variant. The test split is not touched, so
the gate judges the winner on text that chose nothing. Quality is taken to be monotone in the width: for each method
and group size a bisection finds the smallest width within budget (a width below one that failed is not tried). What
was measured is kept in the scratch folder, so a killed search goes on, and everything follows from the seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.architectures.config import IGNORED
from models.compression import search
from pipelines.compression import calibration
from pipelines.compression.calibration import Batch
from pipelines.compression.config import CompressConfig
from pipelines.compression.report import Budget, CompressionReport, SearchFacts, Trial
from pipelines.compression.run import CompressionRun
from pipelines.compression.streaming import Stream
from pipelines.core import artifact
from pipelines.core.errors import ConfigError
from pipelines.measure.intervals import paired_ratio

_OF_THE_VARIANT = {"name", "method", "from_", "parameters"}
"""Keys of the configuration that candidates have of their own; the others are the engine's."""


# ---- which candidates, and which of them wins


def smallest_within(bits: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the smallest width that fits, None when the widest does not; asks about log2(n) + 1 widths at most.

    Args:
        bits: widths; order and repetition do not matter.
        fits: whether a width is within budget; taken to be monotone.
    """
    widths = sorted(set(bits))
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if fits(widths[middle]):
            high = middle
        else:
            low = middle + 1
    return widths[low] if low < len(widths) else None


def within(trial: Trial, config: search.Config) -> bool:
    """Return whether a candidate keeps the budget: the upper end of its loss ratio, and its divergence."""
    divergence = config.max_kl_nats is None or trial.kl_nats <= config.max_kl_nats
    return divergence and trial.ratio.high <= config.max_bits_per_byte_ratio


def best(trials: Sequence[Trial], config: search.Config) -> Trial | None:
    """Return the smallest candidate within budget; of equally small ones the one with the least loss."""
    return min((t for t in trials if within(t, config)), key=lambda t: (t.bytes, t.ratio.value, t.method), default=None)


# ---- the stage


def compress(run: CompressionRun) -> CompressionReport:
    """Search, then make the winner as any compress stage does; its report gains `search`.

    Raises:
        ConfigError: no candidate is within budget; the nearest is named.
    """
    parameters = run.config.parameters
    assert isinstance(parameters, search.Config)
    tokens_NT = calibration.sample_tokens(
        run.prepare, samples=parameters.sequences, seed=run.config.seed, masked=run.masked, split="validation"
    )
    labels_NT = calibration.labels(run.prepare, tokens_NT, seed=run.config.seed, masked=run.masked, split="validation")
    text = SearchText(run, calibration.batches(run.prepare, tokens_NT, labels_NT))
    trials: list[Trial] = []
    most = len(parameters.methods) * len(parameters.group_sizes) * len(parameters.bits).bit_length()
    for method, group_size in product(parameters.methods, parameters.group_sizes):

        def fits(bits: int, method: str = method, group_size: int = group_size) -> bool:
            trial = _trial(run, text, candidate(run.config, method, bits, group_size))
            trials.append(trial)
            run.progress(len(trials), most, "candidates", str(trial))
            return within(trial, parameters)

        smallest_within(parameters.bits, fits)
    chosen = best(trials, parameters)
    if chosen is None:
        nearest = min(trials, key=lambda t: t.ratio.high)
        raise ConfigError(
            f"compress.{run.config.name}: none of {len(trials)} candidates keeps the budget; nearest is {nearest}",
            hint="allow more bits, raise max_bits_per_byte_ratio or max_kl_nats",
        )
    winner = candidate(run.config, chosen.method, chosen.bits, chosen.group_size)
    run.compress(winner, run.inputs, run.out_dir, run.context)
    facts = SearchFacts(
        budget=Budget(max_bits_per_byte_ratio=parameters.max_bits_per_byte_ratio, max_kl_nats=parameters.max_kl_nats),
        sequences=len(tokens_NT),
        chosen=chosen,
        trials=trials,
    )
    return CompressionReport.read(run.out_dir).model_copy(update={"search": facts})


def candidate(config: CompressConfig, method: str, bits: int, group_size: int) -> CompressConfig:
    """Return the configuration of one candidate: the engine's keys are those of the search."""
    engine = {key: getattr(config, key) for key in CompressConfig.model_fields.keys() - _OF_THE_VARIANT}
    return CompressConfig.model_validate({**engine, "method": method, "bits": bits, "group_size": group_size})


def _trial(run: CompressionRun, text: SearchText, config: CompressConfig) -> Trial:
    """Return the measurement of one candidate, from the scratch folder if an earlier attempt made it."""
    grid = config.parameters.model_dump(include={"bits", "group_size"})
    record = run.context.scratch / f"trial-{config.method}-{grid['bits']}-{grid['group_size']}.json"
    if record.is_file():
        return Trial.model_validate_json(record.read_bytes())
    folder = run.context.scratch / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Only the winner is compared with its baselines.
    run.compress(config.model_copy(update={"baseline_documents": 0}), run.inputs, folder, run.context)
    nats, kl = text.compare(folder / "model")
    size = CompressionReport.read(folder).totals.bytes
    shutil.rmtree(folder)
    ratio = paired_ratio(nats[1], nats[0], np.ones(len(nats[0])))
    trial = Trial(method=config.method, **grid, bytes=size, ratio=ratio, kl_nats=kl)
    artifact.write_text(record, trial.model_dump_json())
    return trial


class SearchText:
    """Validation documents that candidates are measured on, and the base behind its last block.

    Candidates are scored block by block. What stays in memory of the base are its hidden states in front of the head.

    Args:
        run: the base.
        text: the documents.
    """

    def __init__(self, run: CompressionRun, text: Sequence[Batch]) -> None:
        self._run, self._text = run, text
        self._calls = [{"input_ids": torch.from_numpy(batch.tokens_BL).to(run.device)} for batch in text]
        self._base = Stream.of_base(run, self._calls)
        self._base.finish()

    def compare(self, folder: Path) -> tuple[NDArray[np.float64], float]:
        """Return the nats of each document under base and variant [2, N], and the mean KL(base || variant).

        Both means are over the positions that a label asks for.
        """
        variant = Stream.of_folder(self._run, folder, self._calls)
        variant.finish()
        nats: list[Tensor] = []
        divergence, asked = 0.0, 0
        for number, batch in enumerate(self._text):
            labels = torch.from_numpy(batch.labels_BL).to(self._run.device)
            before, after = (s.logits(number).double().log_softmax(-1) for s in (self._base, variant))
            wanted = labels != IGNORED
            targets = torch.where(wanted, labels, 0)[..., None]
            nats.append(torch.stack([-(p.gather(-1, targets)[..., 0] * wanted).sum(-1) for p in (before, after)]))
            divergence += float(((before.exp() * (before - after)).sum(-1) * wanted).sum())
            asked += int(wanted.sum())
        return torch.cat(nats, dim=1).cpu().numpy(), divergence / asked
