"""What a model writes is kept for people: the same bytes twice, from held-out documents or from given prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Family
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.stage import StageContext
from pipelines.data import tokenizer as tokenization
from pipelines.evaluation import probe, stage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.probes.samples import SamplesSettings
from pipelines.measure import heldout, openings

QUICK = {"tasks": {"names": []}, "baselines": [], "max_documents": 3}


@pytest.fixture(scope="module")
def untrained(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Artifact]:
    """A model of each family that has learned nothing, published as pretrain does."""
    found: dict[Family, Artifact] = {}
    for family in ("decoder", "encoder"):
        shape = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 48, "vocab_size": 512, "max_positions": 64}
        config = ArchitectureConfig(family=family, **shape, bos_id=0, eos_id=1, pad_id=2, mask_id=3, init_std=0.2)
        folder = tmp_path_factory.mktemp(family) / "build"
        build(config, seed=0).save_pretrained(folder / "model")
        for path in (prepared.path / "tokenizer").iterdir():
            (folder / "model" / path.name).write_bytes(path.read_bytes())
        names: dict[str, Any] = {"stage": "pretrain", "node": "pretrain", "parents": {}, "summary": {}}
        found[family] = artifact.publish(folder, folder.parent / "final", identity={"family": family}, **names)
    return found


def evaluated(
    prepared: Artifact, model: Artifact, folder: Path, context: StageContext, **settings: Any
) -> list[dict[str, Any]]:
    probes = {"latency": {"enabled": False}, "relative": {"enabled": False}, "samples": settings}
    folder.mkdir()
    summary = stage.run(
        EvaluateConfig.model_validate(QUICK | {"probes": probes}),
        {"prepare": prepared, "model": model},
        folder,
        context,
    )
    rows: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text())
    assert summary["probes"]["samples"] == {"prompts": len(rows)}, "texts are no facts for tables"
    return rows


def test_a_decoder_goes_on_with_the_first_words_of_held_out_documents(
    prepared: Artifact, untrained: dict[Family, Artifact], context: StageContext, tmp_path: Path
) -> None:
    rows = [evaluated(prepared, untrained["decoder"], tmp_path / name, context) for name in ("a", "b")]
    assert rows[0] == rows[1]
    assert (tmp_path / "a" / "samples.json").read_bytes() == (tmp_path / "b" / "samples.json").read_bytes()
    texts = [document.text.strip() for document in heldout.read_documents(prepared.path / "documents/test.jsonl.zst")]
    assert len({row["prompt"] for row in rows[0]}) == openings.COUNT
    assert all(any(text.startswith(row["prompt"]) for text in texts) for row in rows[0])
    assert all(len(row["text"]) > 5 for row in rows[0])
    hot = evaluated(prepared, untrained["decoder"], tmp_path / "c", context, seed=1, documents=1, new_tokens=4)
    assert [row["prompt"] for row in hot] == [rows[0][0]["prompt"]]
    assert not rows[0][0]["text"].startswith(hot[0]["text"])


def test_an_encoder_fills_in_a_word_of_held_out_documents(
    prepared: Artifact, untrained: dict[Family, Artifact], context: StageContext, tmp_path: Path
) -> None:
    rows = evaluated(prepared, untrained["encoder"], tmp_path / "a", context)
    assert rows == evaluated(prepared, untrained["encoder"], tmp_path / "b", context)
    texts = [document.text.strip() for document in heldout.read_documents(prepared.path / "documents/test.jsonl.zst")]
    assert len(rows) == openings.COUNT
    for row in rows:
        whole = row["prompt"].replace("<|mask|>", row["answer"])
        assert any(text.startswith(whole) for text in texts)
        chances = [word["probability"] for word in row["masks"][0]]
        assert chances == sorted(chances, reverse=True)
        assert len(chances) == 5


def test_given_prompts_take_the_place_of_documents(
    prepared: Artifact, untrained: dict[Family, Artifact], context: StageContext, tmp_path: Path
) -> None:
    asked = ["The import", "A class"]
    rows = evaluated(prepared, untrained["decoder"], tmp_path / "a", context, prompts=asked, temperature=0.0)
    assert [row["prompt"] for row in rows] == asked
    rows = evaluated(prepared, untrained["encoder"], tmp_path / "b", context, prompts=["The ___ [MASK]"])
    assert len(rows[0]["masks"]) == 2
    assert "answer" not in rows[0]
    with pytest.raises(ValidationError, match="documents = 2 does nothing beside prompts"):
        SamplesSettings.model_validate({"prompts": asked, "documents": 2})


@pytest.mark.parametrize("positions", [16, 64, 512])
def test_openings_leave_room_however_short_the_sequences_are(
    positions: int, prepared: Artifact, untrained: dict[Family, Artifact]
) -> None:
    tokenizer = Tokenizer.from_file(str(prepared.path / "tokenizer" / "tokenizer.json"))
    documents = list(heldout.read_documents(prepared.path / "documents/test.jsonl.zst"))
    limits: dict[Family, int] = {"decoder": positions // 2, "encoder": positions - 2}
    for family, most in limits.items():
        for opening in openings.of(documents, tokenizer, family, count=50, positions=positions):
            pieces = tokenization.encode(tokenizer, openings.MASKS.split(opening.text))
            assert sum(map(len, pieces)) + len(pieces) - 1 <= most


def test_settings_that_do_nothing_for_a_family_are_refused() -> None:
    samples = probe.get("samples")
    for key, value in {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 0, "new_tokens": 5}.items():
        settings = SamplesSettings.model_validate({key: value})
        assert samples.misfit(settings, "decoder") is None
        assert (samples.misfit(settings, "encoder") or "").startswith(f"{key} does nothing")
    for settings in (SamplesSettings(), SamplesSettings(prompts=("a ___",))):
        assert samples.misfit(settings, "encoder") is None
    assert "'a b' has none" in (samples.misfit(SamplesSettings(prompts=("a ___", "a b")), "encoder") or "")
