"""Scoring against slow, obvious references: one forward pass per token, one probability at a time."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError, NumericError
from pipelines.measure import heldout, scoring, windows
from pipelines.measure.batches import plan_batches
from pipelines.measure.config import BatchSettings
from pipelines.measure.scoring import Scorer


def _quiet(_done: int, _total: int) -> None:
    """Report nothing."""


def _scorer(model: Any, family: str = "decoder") -> Scorer:
    return Scorer(model, family, "the model", "cpu")  # type: ignore[arg-type]


def _one_token_at_a_time(model: Any, ids: np.ndarray, context: int, stride: int) -> float:
    """Return the nats of a document: for each token a forward pass over exactly the history its window gives it."""
    nats, first, windows_done = 0.0, 1, 0
    while first < len(ids):
        end = min(len(ids), first + (stride if windows_done else context))
        start = max(0, end - 1 - context)
        for position in range(first, end):
            history = torch.tensor(ids[start:position])[None]
            with torch.no_grad():
                logits = model(input_ids=history).logits[0, -1].double()
            nats -= float(torch.log_softmax(logits, dim=-1)[ids[position]])
        first, windows_done = end, windows_done + 1
    return nats


def test_nats_of_documents_equal_one_forward_pass_per_token(decoder: Any) -> None:
    """Documents shorter than, as long as and longer than a window, in batches with padding."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(4, 512, size=n).astype(np.int64) for n in (2, 7, 24, 25, 26, 70)]
    cuts = [w for d, ids in enumerate(documents) for w in windows.causal_windows(len(ids), d, 24, 16)]
    batches = windows.causal_batches(documents, cuts, 64)
    found = scoring.document_nats(_scorer(decoder), batches, len(documents), _quiet)
    expected = [_one_token_at_a_time(decoder, ids, 24, 16) for ids in documents]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_the_batch_size_changes_the_result_by_rounding_only(decoder: Any, prepared: Artifact) -> None:
    held = heldout.load(prepared.path, 4)
    found = [
        scoring.document_nats(
            _scorer(decoder),
            plan_batches(BatchSettings(batch_tokens=tokens), held, "decoder", prepared.path).batches,
            4,
            _quiet,
        )
        for tokens in (64, 1024, 1024)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    np.testing.assert_array_equal(found[1], found[2])


def test_masked_nats_equal_a_loop_over_masked_tokens(encoder: Any, prepared: Artifact) -> None:
    held = heldout.load(prepared.path, 3)
    plan = plan_batches(BatchSettings(batch_tokens=256), held, "encoder", prepared.path)
    found = scoring.document_nats(_scorer(encoder, "encoder"), plan.batches, 3, _quiet)
    for document, ids in enumerate(held.tokens):
        expected = 0.0
        for start in range(0, len(ids), 64):
            hidden = plan.masked[document][start : start + 64]
            shown = torch.tensor(np.where(hidden, 3, ids[start : start + 64]))[None]
            with torch.no_grad():
                log_p = torch.log_softmax(encoder(input_ids=shown).logits[0].double(), dim=-1)
            expected -= sum(float(log_p[i, ids[start + i]]) for i in np.flatnonzero(hidden))
        assert found[document] == pytest.approx(expected, rel=1e-5)


def test_progress_counts_every_scored_token(decoder: Any, prepared: Artifact) -> None:
    held = heldout.load(prepared.path, 2)
    plan = plan_batches(BatchSettings(), held, "decoder", prepared.path)
    seen: list[tuple[int, int]] = []
    scoring.document_nats(_scorer(decoder), plan.batches, 2, lambda done, total: seen.append((done, total)))
    total = sum(len(ids) - 1 for ids in held.tokens)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_model_with_non_finite_logits_is_a_numeric_error(decoder: Any, poison: float) -> None:
    broken = copy.deepcopy(decoder)
    with torch.no_grad():
        broken.model.norm.weight[3] = poison
    document = np.arange(4, 40, dtype=np.int64)
    batches = windows.causal_batches([document], windows.causal_windows(36, 0, 24, 16), 64)
    with pytest.raises(NumericError, match=r"the model gives logits that are not finite"):
        scoring.document_nats(_scorer(broken), batches, 1, _quiet)


def test_one_infinite_logit_of_a_wrong_token_is_found(decoder: Any) -> None:
    """The likelihood of the right token may stay finite; the model is broken all the same."""
    broken = copy.deepcopy(decoder)
    row = torch.zeros(512)
    row[500] = -math.inf
    broken.lm_head.register_forward_hook(lambda _module, _inputs, output: output + row)
    document = np.arange(4, 40, dtype=np.int64)
    batches = windows.causal_batches([document], windows.causal_windows(36, 0, 24, 16), 64)
    with pytest.raises(NumericError, match="not finite"):
        scoring.document_nats(_scorer(broken), batches, 1, _quiet)


def test_kl_divergence_equals_its_definition_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    base, variant = torch.randn(2, 5, 9, generator=generator)
    found = scoring.kl_divergence(base, variant)
    for i in range(5):
        p, q = torch.softmax(base[i].double(), 0), torch.softmax(variant[i].double(), 0)
        assert float(found[i]) == pytest.approx(
            sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True)), 1e-5
        )
    torch.testing.assert_close(scoring.kl_divergence(base, base), torch.zeros(5), atol=0.0, rtol=0.0)


def test_divergence_is_zero_for_the_same_model_and_grows_with_the_damage(decoder: Any, prepared: Artifact) -> None:
    held = heldout.load(prepared.path, 2)
    batches = plan_batches(BatchSettings(), held, "decoder", prepared.path).batches
    found = []
    for noise in (0.0, 0.01, 0.05):
        variant = copy.deepcopy(decoder)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in variant.parameters():
                weight.add_(noise * torch.randn(weight.shape, generator=generator))
        found.append(scoring.divergence(_scorer(decoder), _scorer(variant), batches))
    assert found[0]["kl_nats_per_token"] == 0.0
    assert found[0]["top1_agreement"] == 1.0
    assert 0.0 < found[1]["kl_nats_per_token"] < found[2]["kl_nats_per_token"]
    assert found[1]["top1_agreement"] > found[2]["top1_agreement"]
    assert found[0]["kl_tokens"] == sum(len(ids) - 1 for ids in held.tokens)


def test_a_folder_without_weights_is_an_integrity_error(decoder_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((decoder_artifact.path / "model" / "config.json").read_bytes())
    with pytest.raises(IntegrityError, match="cannot be loaded by transformers"):
        scoring.load(tmp_path, "cpu")


def test_the_cache_of_a_decoder_is_counted_and_an_encoder_has_none(
    decoder: Any, encoder: Any, prepared: Artifact
) -> None:
    held = heldout.load(prepared.path)
    batch = plan_batches(BatchSettings(), held, "decoder", prepared.path).batches[0]
    config = decoder.config
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert scoring.cache_bytes_per_token(_scorer(decoder), batch) == size
    assert scoring.cache_bytes_per_token(_scorer(encoder, "encoder"), batch) is None


def test_a_folder_with_cache_tables_is_scored_through_its_quantized_cache(
    decoder_artifact: Artifact, prepared: Artifact, tmp_path: Path
) -> None:
    """The nats of a text are those of reading it token by token out of the quantized cache."""
    from pipelines.compression import stage as compress
    from pipelines.compression.config import CompressConfig
    from pipelines.core.stage import StageContext

    config = CompressConfig.model_validate({"method": "kvquant", "bits": 2, "samples": 8})
    context = StageContext(node="compress.x", scratch=tmp_path)
    compress.run(config, {"prepare": prepared, "model": decoder_artifact}, tmp_path, context)
    variant, base = (scoring.load(folder / "model", "cpu") for folder in (tmp_path, decoder_artifact.path))
    ids = heldout.load(prepared.path).tokens[0][:40]
    batches = windows.causal_batches([ids], windows.causal_windows(len(ids), 0, len(ids), len(ids)), 4096)
    nats, parent_nats = (scoring.document_nats(scorer, batches, 1, _quiet)[0] for scorer in (variant, base))
    cache, slow = variant.model.new_cache(), 0.0
    with torch.no_grad():
        for one, following in itertools.pairwise(ids):
            logits = variant.model(torch.tensor([[one]]), past_key_values=cache).logits[0, -1]
            slow -= float(logits.log_softmax(-1)[following])
    assert nats == pytest.approx(slow, rel=1e-5)
    assert abs(nats - parent_nats) > 1e-3 * parent_nats
    small, full = (scoring.cache_bytes_per_token(scorer, batches[0]) for scorer in (variant, base))
    assert small is not None
    assert full is not None
    assert 2 / 32 < small / full < 0.4


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.rotary_emb"])
def test_a_model_with_a_part_on_another_device_is_refused_by_the_name_of_the_part(decoder: Any, part: str) -> None:
    """`meta` stands for a GPU: a model left on the CPU, or moved only in part, is told before any kernel complains."""
    torn = copy.deepcopy(decoder)
    torn.get_submodule(part).to("meta")
    document = np.arange(4, 40, dtype=np.int64)
    batches = windows.causal_batches([document], windows.causal_windows(36, 0, 24, 16), 64)
    with pytest.raises(ValueError, match=rf"the model is scored on cpu, but its {part}\.\w+ is on meta"):
        scoring.document_nats(_scorer(torn), batches, 1, _quiet)
    left_behind = Scorer(decoder, "decoder", "the model", "meta")
    with pytest.raises(ValueError, match=r"scored on meta, but its model\.embed_tokens\.weight is on cpu"):
        scoring.cache_bytes_per_token(left_behind, batches[0])
