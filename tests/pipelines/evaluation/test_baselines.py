"""The baselines on real text: their order, their bytes, and what they are compared on."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipelines.core.artifact import Artifact
from pipelines.evaluation import baselines, ngram
from pipelines.evaluation.config import EvaluateConfig
from pipelines.measure import heldout


def test_compressors_need_the_bytes_that_the_command_line_tools_need(prepared: Artifact, tmp_path: Path) -> None:
    text = "\n".join(d.text for d in heldout.load(prepared.path).documents).encode()
    (tmp_path / "text").write_bytes(text)
    for name, command in (("gzip", ["gzip", "-9", "-n", "-c"]), ("xz", ["xz", "-9e", "-c"])):
        if shutil.which(name) is None:
            continue
        packed = subprocess.run([*command, str(tmp_path / "text")], capture_output=True, check=True).stdout
        # Python's gzip and the tool agree in the stream; headers and zlib builds differ by some bytes.
        assert baselines.compressed_bits(name, text) == pytest.approx(8 * len(packed), rel=0.005)


def test_all_named_baselines_come_back_in_the_order_of_the_configuration(prepared: Artifact) -> None:
    held = heldout.load(prepared.path)
    config = EvaluateConfig(baselines=("order2", "gzip", "unigram", "order1"))
    assert list(baselines.for_decoder(config, prepared.path, held)) == ["order2", "gzip", "order1"]
    assert baselines.for_decoder(EvaluateConfig(baselines=()), prepared.path, held) == {}


def test_history_helps_on_real_text_and_uniform_guessing_is_worse_than_all(prepared: Artifact) -> None:
    held = heldout.load(prepared.path)
    found = baselines.for_decoder(EvaluateConfig(), prepared.path, held)
    tokens = sum(len(ids) - 1 for ids in held.tokens)
    uniform = tokens * math.log2(512) / held.sizes.sum()
    assert found["order3"] < found["order2"] < found["order1"] < uniform
    assert 1.0 < found["xz"] < found["gzip"] < 5.0


def test_count_models_score_the_tokens_of_the_model_and_nothing_else(prepared: Artifact) -> None:
    """Order 1 by hand: every token but the start, the end of the document among them."""
    held = heldout.load(prepared.path)
    counts = baselines.count(EvaluateConfig(), prepared.path, held, order=1)
    nothing = np.zeros((512, 0), dtype=np.int64)
    probability = counts.probabilities(nothing, np.arange(512), order=1)
    bits = -sum(math.log2(probability[i]) for ids in held.tokens for i in ids[1:])
    found = baselines.for_decoder(EvaluateConfig(baselines=("order1",)), prepared.path, held)
    assert found["order1"] == pytest.approx(bits / held.sizes.sum(), rel=1e-9)


def test_the_encoder_is_compared_on_its_masked_tokens(prepared: Artifact) -> None:
    held = heldout.load(prepared.path)
    masked = [np.arange(len(ids)) % 5 == 2 for ids in held.tokens]
    counts = baselines.count(EvaluateConfig(), prepared.path, held, order=1)
    nats = 0.0
    for ids, hidden in zip(held.tokens, masked, strict=True):
        for token in ids[hidden]:
            alone = np.array([token])
            nats -= math.log(counts.probabilities(np.zeros((1, 0), dtype=np.int64), alone, order=1)[0])
    found = baselines.for_encoder(EvaluateConfig(), prepared.path, held, masked, size=1000)
    assert found == {"unigram": pytest.approx(nats / (1000 * math.log(2.0)), rel=1e-9)}
    assert baselines.for_encoder(EvaluateConfig(baselines=("gzip",)), prepared.path, held, masked, size=1) == {}


def test_counting_the_train_tokens_gives_the_train_tokens_a_better_score_than_held_out_ones(prepared: Artifact) -> None:
    """A control that the counts are of the train split."""
    held = heldout.load(prepared.path)
    counts = baselines.count(EvaluateConfig(), prepared.path, held, order=3)
    rows = heldout.train_rows(prepared.path, held.index, 10**9)
    train = ngram.document_nats(counts, list(rows[:50]), 3).sum() / (50 * 62)
    heldout_nats = ngram.document_nats(counts, held.tokens, 3).sum() / sum(len(ids) - 2 for ids in held.tokens)
    assert train < 0.7 * heldout_nats
