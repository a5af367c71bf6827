"""The search for the smallest child within a budget: one compress stage that tries methods and widths inside.

The graph of a run is static, so the candidates are no nodes of it: they are built in the scratch folder, measured on
the *validation* split and thrown away, and the winner is built again as the child. The test split is not touched, so
the gate judges the winner on text that chose nothing. Quality is taken to be monotone in the width: for each method
and group size a bisection finds the smallest width within budget (a width below one that failed is not tried). What
was measured is kept in the scratch folder, so a killed search goes on, and everything follows from the seed.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.compression import search
from pipelines.compression import calibration
from pipelines.compression.config import CompressConfig
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext, Summary
from pipelines.measure.intervals import paired_ratio
from pipelines.modelio.folder import write_json
from pipelines.modelio.load import load_model

_BATCH = 8
_OF_THE_CHILD = {"name", "method", "from_", "parameters"}
"""Keys of the configuration that candidates have of their own; the others are the engine's."""


@dataclass(frozen=True)
class Trial:
    """A candidate as it was measured."""

    method: str
    bits: int
    group_size: int
    bytes: int
    """Weight files on disk."""
    ratio: dict[str, float]
    """Validation loss over the parent's: value, low, high; paired over sequences."""
    kl_nats: float
    """Mean divergence of the child's predictions from the parent's, nats per token."""

    def __str__(self) -> str:
        place = f"groups of {self.group_size}" if self.group_size else "a row"
        return (
            f"{self.method} {self.bits} bit, {place}: {self.bytes} bytes, loss ratio {self.ratio['value']:.4f}, "
            f"upper end {self.ratio['high']:.4f}, KL {self.kl_nats:.4f}"
        )


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
    return divergence and trial.ratio["high"] <= config.max_bits_per_byte_ratio


def best(trials: Sequence[Trial], config: search.Config) -> Trial | None:
    """Return the smallest candidate within budget; of equally small ones the one with the least loss."""
    return min(
        (t for t in trials if within(t, config)), key=lambda t: (t.bytes, t.ratio["value"], t.method), default=None
    )


# ---- the stage


def run(config: CompressConfig, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    """Search, then write the winner as any compress stage does; `compression.json` gains `search`.

    Raises:
        ConfigError: no candidate is within budget; the nearest is named.
    """
    from pipelines.compression import stage

    parameters = config.parameters
    assert isinstance(parameters, search.Config)
    bench = _Bench(config, parameters, inputs, context)
    for method, size in product(parameters.methods, parameters.group_sizes):
        smallest_within(parameters.bits, functools.partial(bench.fits, method, size))
    chosen = best(bench.trials, parameters)
    if chosen is None:
        nearest = min(bench.trials, key=lambda t: t.ratio["high"])
        raise ConfigError(
            f"compress.{config.name}: none of {len(bench.trials)} candidates keeps the budget; nearest is {nearest}",
            hint="allow more bits, raise max_bits_per_byte_ratio or max_kl_nats",
        )
    summary = stage.run(bench.candidate(chosen.method, chosen.bits, chosen.group_size), inputs, out_dir, context)
    found = {
        "budget": {k: getattr(parameters, k) for k in ("max_bits_per_byte_ratio", "max_kl_nats")},
        "sequences": len(bench.tokens_NT),
        "chosen": asdict(chosen),
        "trials": [asdict(trial) for trial in bench.trials],
    }
    report = json.loads((out_dir / "compression.json").read_text(encoding="utf-8"))
    write_json(out_dir / "compression.json", report | {"search": found})
    return {**summary, "search": {key: found[key] for key in ("budget", "chosen")}}


class _Bench:
    """Builds candidates, measures them beside the parent, and remembers."""

    def __init__(
        self, config: CompressConfig, parameters: search.Config, inputs: Mapping[str, Artifact], context: StageContext
    ) -> None:
        self._config, self._parameters, self._inputs, self._context = config, parameters, inputs, context
        self._parent = load_model(inputs["model"].path / "model")
        masked, prepare, seed = type(self._parent).__name__.endswith("ForMaskedLM"), inputs["prepare"].path, config.seed
        self.tokens_NT = calibration.sample_tokens(
            prepare, samples=parameters.sequences, seed=seed, masked=masked, split="validation"
        )
        self._labels_NT = calibration.labels(prepare, self.tokens_NT, seed=seed, masked=masked, split="validation")
        self.trials: list[Trial] = []
        lines = len(parameters.methods) * len(parameters.group_sizes)
        self._most = lines * (len(parameters.bits).bit_length())

    def candidate(self, method: str, bits: int, group_size: int, **changes: int) -> CompressConfig:
        """Return the configuration of one candidate: the engine's keys are those of the search."""
        engine = {key: getattr(self._config, key) for key in CompressConfig.model_fields.keys() - _OF_THE_CHILD}
        own = {"method": method, "bits": bits, "group_size": group_size}
        return CompressConfig.model_validate({**engine, **own, **changes})

    def fits(self, method: str, group_size: int, bits: int) -> bool:
        """Return whether a candidate is within budget."""
        return within(self.trial(method, bits, group_size), self._parameters)

    def trial(self, method: str, bits: int, group_size: int) -> Trial:
        """Return the measurement of one candidate, from the scratch folder if an earlier attempt made it."""
        record = self._context.scratch / f"trial-{method}-{bits}-{group_size}.json"
        if record.is_file():
            trial = Trial(**json.loads(record.read_text(encoding="utf-8")))
        else:
            trial = self._measured(method, bits, group_size)
            artifact.write_text(record, json.dumps(asdict(trial)))
        self.trials.append(trial)
        self._context.report(Progress(self._context.node, len(self.trials), self._most, "candidates", str(trial)))
        return trial

    def _measured(self, method: str, bits: int, group_size: int) -> Trial:
        from pipelines.compression import stage

        folder = self._context.scratch / "candidate"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Only the winner is compared with its arms.
        config = self.candidate(method, bits, group_size, arms_documents=0)
        made = stage.run(config, self._inputs, folder, self._context)
        child = load_model(folder / "model")
        nats, kl = compare(self._parent, child, self.tokens_NT, self._labels_NT)
        shutil.rmtree(folder)
        ratio = paired_ratio(nats[1], nats[0], np.ones(len(nats[0])))
        return Trial(method, bits, group_size, made["totals"]["bytes"], ratio.to_json(), kl)


@torch.no_grad()
def compare(
    parent: PreTrainedModel, child: PreTrainedModel, tokens_NT: NDArray[np.int64], labels_NT: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float]:
    """Return the nats of each sequence under both models [2, N], parent first, and the mean KL(parent || child).

    Both means are over the positions that a label asks for.
    """
    nats: list[Tensor] = []
    divergence, asked = 0.0, 0
    for start in range(0, len(tokens_NT), _BATCH):
        ids, labels = (torch.from_numpy(part[start : start + _BATCH]) for part in (tokens_NT, labels_NT))
        before, after = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (parent, child))
        wanted = labels != calibration.IGNORED
        targets = torch.where(wanted, labels, 0)[..., None]
        nats.append(torch.stack([-(p.gather(-1, targets)[..., 0] * wanted).sum(-1) for p in (before, after)]))
        divergence += float(((before.exp() * (before - after)).sum(-1) * wanted).sum())
        asked += int(wanted.sum())
    return torch.cat(nats, dim=1).numpy(), divergence / asked
