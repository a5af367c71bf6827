"""Forward passes over held-out text: log likelihoods of documents, and how far a variant is from its base model.

Shape letters as in `windows.py`; V is the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from models.architectures.config import Family
from models.compression.modules.quantized_cache import QuantizedCache
from pipelines.core.errors import IntegrityError, NumericError
from pipelines.measure.windows import Batch
from pipelines.modelio import folder
from pipelines.modelio import load as compressed

# ---- pure functions ---------------------------------------------------------------------------------------------


def negative_log_likelihood(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return -ln p(target) in nats [N], computed in float32."""
    return functional.cross_entropy(logits_NV.float(), target_N, reduction="none")


def kl_divergence(base_NV: Tensor, variant_NV: Tensor) -> Tensor:
    """Return KL(base || variant) in nats [N]: zero only where the two distributions are equal."""
    base_log = functional.log_softmax(base_NV.float(), dim=-1)
    variant_log = functional.log_softmax(variant_NV.float(), dim=-1)
    return (base_log.exp() * (base_log - variant_log)).sum(dim=-1)


def refuse_not_finite(logits_NV: Tensor, name: str) -> None:
    """Refuse what a damaged model computes.

    Args:
        logits_NV: what it predicts.
        name: how errors call the model.

    Raises:
        NumericError: a logit is not finite.
    """
    # A sum is finite only if all its terms are: one cheap pass instead of a comparison of every logit.
    if not bool(torch.isfinite(logits_NV.sum())):
        raise NumericError(
            f"{name} gives logits that are not finite", hint="the model is damaged or diverged; train it again"
        )


# ---- models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A loaded model that gives logits for batches."""

    model: Any
    family: Family
    name: str
    """How errors call the model."""
    device: str

    def check_device(self) -> None:
        """Refuse a model that is not where batches go.

        Raises:
            ValueError: names the first parameter or buffer that is on another device.
        """
        wanted = torch.device(self.device)
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if tensor.device.type != wanted.type or wanted.index not in (None, tensor.device.index):
                raise ValueError(
                    f"{self.name} is scored on {wanted}, but its {name} is on {tensor.device}: "
                    "move the model before scoring it"
                )

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits at the scored outputs [N, V].

        Raises:
            NumericError: a logit is not finite.
            ValueError: the model is not on the device that batches go to.
        """
        self.check_device()
        logits_BKV = self.model(**call_of(batch, self.family, self.device)).logits
        return scored_logits(logits_BKV, batch, self.family, self.name)


def call_of(batch: Batch, family: Family, device: str) -> dict[str, Any]:
    """Return what a model of the family is called with to score a batch."""
    ids_BL = torch.from_numpy(batch.ids).to(device)
    if family == "encoder":
        return {"input_ids": ids_BL, "attention_mask": torch.from_numpy(batch.shown).to(device).long()}
    # Rows are padded on the right, where no causal output looks; only outputs that are scored become logits.
    return {"input_ids": ids_BL, "use_cache": False, "logits_to_keep": batch.ids.shape[1] - int(batch.columns.min())}


def scored_logits(logits_BKV: Tensor, batch: Batch, family: Family, name: str) -> Tensor:
    """Return the logits at the scored outputs [N, V] among those that `call_of` asked for, the last K of each row.

    Raises:
        NumericError: a logit is not finite; `name` is how the error calls the model.
    """
    row_N, column_N = (torch.from_numpy(places).to(logits_BKV.device) for places in (batch.rows, batch.columns))
    if family == "decoder":
        column_N = column_N - int(batch.columns.min())
    everything = logits_BKV.flatten(0, 1)
    # When every output is scored, in order, the selection would only copy.
    logits_NV = everything if len(row_N) == len(everything) else logits_BKV[row_N, column_N]
    refuse_not_finite(logits_NV, name)
    return logits_NV


def load(model: Path, device: str) -> Scorer:
    """Load a model folder, in the type it is stored in: through plain transformers wherever that reads it.

    Raises:
        IntegrityError: the folder does not hold a readable model.
        NumericError: a weight is not finite.
    """
    family = folder.family_of(model)
    transformers_logging.disable_progress_bar()
    auto = AutoModelForCausalLM if family == "decoder" else AutoModelForMaskedLM
    try:
        if compressed.is_private(model):
            loaded: Any = compressed.load_model(model)
        else:
            loaded = auto.from_pretrained(model, dtype="auto", local_files_only=True)
            compressed.refuse_not_finite(loaded, model)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{model} cannot be loaded by transformers: {error}") from error
    return Scorer(loaded.to(device).eval(), family, str(model), device)


# ---- measures ---------------------------------------------------------------------------------------------------


def document_nats(
    scorer: Scorer, batches: Sequence[Batch], documents: int, report: Callable[[int, int], None]
) -> NDArray[np.float64]:
    """Return the summed negative log likelihood of each document's scored tokens, in nats [documents].

    Args:
        scorer: the model.
        batches: every scored token once.
        documents: number of documents.
        report: called with (tokens scored, tokens in all) after every batch.
    """
    total, done = sum(len(batch.targets) for batch in batches), 0

    def reported() -> Iterator[tuple[Batch, Tensor]]:
        nonlocal done
        for batch, logits_NV in _forward(scorer, batches):
            yield batch, logits_NV
            done += len(batch.targets)
            report(done, total)

    return summed_nats(reported(), documents)


def summed_nats(scored: Iterable[tuple[Batch, Tensor]], documents: int) -> NDArray[np.float64]:
    """Return the summed negative log likelihood of each document [documents], from logits [N, V] of every batch."""
    nats = np.zeros(documents, dtype=np.float64)
    for batch, logits_NV in scored:
        target_N = torch.from_numpy(batch.targets).to(logits_NV.device)
        np.add.at(nats, batch.documents, negative_log_likelihood(logits_NV, target_N).double().cpu().numpy())
    return nats


def divergence(base: Scorer, variant: Scorer, batches: Sequence[Batch]) -> dict[str, float]:
    """Compare the predictions of two models token by token.

    Returns:
        `kl_nats_per_token`, the mean KL(base || variant); `top1_agreement`, the share of tokens at which both put
        the same token first; `kl_tokens`, how many tokens were compared.
    """
    nats, agreed, tokens = 0.0, 0, 0
    for (_, base_NV), (_, variant_NV) in zip(_forward(base, batches), _forward(variant, batches), strict=True):
        nats += float(kl_divergence(base_NV, variant_NV).double().sum())
        agreed += int((base_NV.argmax(dim=-1) == variant_NV.argmax(dim=-1)).sum())
        tokens += len(base_NV)
    return {"kl_nats_per_token": nats / tokens, "top1_agreement": agreed / tokens, "kl_tokens": tokens}


def cache_bytes_per_token(scorer: Scorer, batch: Batch) -> float | None:
    """Return the bytes that a decoder's attention cache holds for each token of one batch; None for an encoder."""
    if scorer.family == "encoder":
        return None
    scorer.check_device()
    ids_BL = torch.from_numpy(batch.ids).to(scorer.device)
    with torch.inference_mode():
        cache = scorer.model(input_ids=ids_BL, use_cache=True, logits_to_keep=1).past_key_values
    if isinstance(cache, QuantizedCache):
        return cache.stored_bytes / ids_BL.numel()
    return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / ids_BL.numel())


def embed(scorer: Scorer, tokens_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of an encoder's last hidden states over the tokens of one text [D]."""
    scorer.check_device()
    ids_BT = torch.from_numpy(tokens_T)[None].to(scorer.device)
    with torch.inference_mode():
        hidden_BTD = scorer.model.base_model(input_ids=ids_BT).last_hidden_state
    mean_D: NDArray[np.float64] = hidden_BTD[0].double().mean(dim=0).cpu().numpy()
    return mean_D


def _forward(scorer: Scorer, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    for batch in batches:
        # The guard is entered per batch: a generator that stays suspended must not leave it switched on outside.
        with torch.inference_mode():
            logits_NV = scorer.logits(batch)
        yield batch, logits_NV
