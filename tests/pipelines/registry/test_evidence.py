"""Evidence from artifacts: identity, numbers, descent, and what makes measurements worthless."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.core.errors import GateRefused
from pipelines.registry import evidence


def test_evidence_holds_what_the_artifacts_say(world: Any) -> None:
    base = world.model("pretrain")
    variant = world.model("int8", base=base)
    measured = world.evaluation(variant, 2.1, size=321)
    found = evidence.read(world.inputs((base, world.evaluation(base, 2.0)), (variant, measured)))
    assert list(found) == ["pretrain", "int8"]
    facts = found["int8"]
    assert (facts.fingerprint, facts.digest) == (variant.manifest.fingerprint, variant.digest)
    assert facts.bits_per_byte["value"] == measured.read_json("evaluation.json")["bits_per_byte"]["value"]
    assert np.array_equal(facts.nats, np.load(measured.path / "document_nats.npy"))
    assert (facts.size_bytes, facts.decode_ms, facts.kl_nats) == (321, 3.21, 0.01)
    assert (facts.method, facts.bits) == ("rtn", 8.5)
    assert facts.test_digest == world.prepare.manifest.files["documents/test.jsonl.zst"].sha256
    assert facts.problems == ()


def test_an_uncompressed_model_has_the_bits_of_its_precision(world: Any) -> None:
    assert evidence.read(world.candidate(2.0))["pretrain"].bits == 32.0


def test_a_chain_of_children_descends_from_the_pretrained_model(world: Any) -> None:
    base = world.model("pretrain")
    pruned = world.model("pruned", base=base)
    quantized = world.model("quantized", base=pruned)
    pairs = [(model, world.evaluation(model, 2.0)) for model in (base, pruned, quantized)]
    found = evidence.read(world.inputs(*pairs))
    assert found["pretrain"].base is None
    assert found["pruned"].base == found["quantized"].base == base.manifest.fingerprint


def test_two_corpora_with_the_same_held_out_text_compare(world: Any) -> None:
    first = evidence.test_digest(world.prepare)
    assert first == evidence.test_digest(world.prepared())
    assert first != evidence.test_digest(world.prepared("Whether 'tis nobler"))


def test_an_evaluation_on_another_corpus_is_a_problem(world: Any) -> None:
    other = world.prepared("Whether 'tis nobler")
    model = world.model("pretrain")
    inputs = world.inputs((model, world.evaluation(model, 2.0, prepare=other)))
    assert evidence.read(inputs)["pretrain"].problems == ("the evaluation used another prepared corpus",)


def test_no_model_at_all_is_refused(world: Any) -> None:
    with pytest.raises(GateRefused, match="no model is put forward"):
        evidence.read({"prepare": world.prepare})
