"""Asking a model from its folder: the same answers as the loaded model gives, and nothing kept in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Family
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.evaluation import neighbours, tryout
from pipelines.measure import heldout, scoring
from pipelines.measure.answers import Question
from pipelines.measure.config import SamplingSettings
from pipelines.measure.prompts import Prompter


@pytest.fixture(scope="module")
def folders(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """The folder of an untrained model of each family."""
    found: dict[Family, Path] = {}
    for family in ("decoder", "encoder"):
        shape = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 48, "vocab_size": 512, "max_positions": 64}
        config = ArchitectureConfig(family=family, **shape, bos_id=0, eos_id=1, pad_id=2, mask_id=3, init_std=0.2)
        found[family] = tmp_path_factory.mktemp(family)
        build(config, seed=0).save_pretrained(found[family])
        for path in (prepared.path / "tokenizer").iterdir():
            (found[family] / path.name).write_bytes(path.read_bytes())
    return found


def question(*prompts: str, count: int = 3, prepared: Path | None = None) -> Question:
    return Question(prompts, SamplingSettings(), new_tokens=8, count=count, prepared=prepared)


def test_a_model_answers_every_prompt_and_is_released(
    folders: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = scoring.load

    def watched(path: Path, device: str) -> scoring.Scorer:
        scorer = load(path, device)
        loaded.append(weakref.ref(scorer.model))
        return scorer

    monkeypatch.setattr(scoring, "load", watched)
    gc.disable()
    try:
        both = tryout.ask(folders["decoder"], "cpu", question("The", "A class"))
        turned = tryout.ask(folders["decoder"], "cpu", question("A class", "The"))
    finally:
        gc.enable()
    assert both == turned[::-1]
    assert [model() for model in loaded] == [None, None]
    words = tryout.ask(folders["encoder"], "cpu", question("The ___ is [MASK]."))
    assert [len(each) for each in words[0]["masks"]] == [3, 3]


def test_a_sentence_is_its_own_neighbour_and_the_others_are_sorted_by_cosine(
    folders: dict[Family, Path], prepared: Artifact
) -> None:
    documents = list(heldout.read_documents(prepared.path / "documents" / "test.jsonl.zst"))
    known = neighbours.sentences(documents)
    assert len({each.text for each in known}) == len(known) <= neighbours.MOST
    by_id = {document.id: " ".join(document.text.split()) for document in documents}
    assert all(each.text in by_id[each.source] for each in known)
    short = min(known, key=lambda each: len(each.text))
    rows = tryout.ask(folders["encoder"], "cpu", question(short.text, count=4, prepared=prepared.path))[0]["neighbours"]
    assert (rows[0]["text"], rows[0]["cosine"], rows[0]["document"]) == (short.text, 1.0, short.source)
    assert [row["cosine"] for row in rows] == sorted((row["cosine"] for row in rows), reverse=True)


def test_neighbours_are_those_of_centred_vectors(folders: dict[Family, Path], prepared: Artifact) -> None:
    known = neighbours.sentences(list(heldout.read_documents(prepared.path / "documents" / "test.jsonl.zst")))[:9]
    prompter = Prompter(scoring.load(folders["encoder"], "cpu"), folders["encoder"])
    vectors = [scoring.embed(prompter.scorer, np.array(prompter.whole(each.text)[:64])) for each in known]
    asked = scoring.embed(prompter.scorer, np.array(prompter.whole("An import")))
    centre = sum(vectors) / len(vectors)

    def cosine(vector: Any) -> float:
        a, b = vector - centre, asked - centre
        return float((a @ b) / np.sqrt((a @ a) * (b @ b)))

    found = neighbours.nearest(prompter, ["An import"], known, 9)[0]
    assert [each.text for each in found] == [
        each.text for each, _ in sorted(zip(known, vectors, strict=True), key=lambda pair: -cosine(pair[1]))
    ]


def test_first_words_are_prompts_without_a_model_being_loaded(folders: dict[Family, Path], prepared: Artifact) -> None:
    for family, folder in folders.items():
        found = tryout.first_words(folder, family, prepared.path)
        assert len(found) == 3
        assert all(("<|mask|>" in each.text) == (family == "encoder") for each in found)


def test_a_prompt_that_is_too_long_is_refused(folders: dict[Family, Path]) -> None:
    with pytest.raises(ConfigError, match="was trained on sequences of 64"):
        tryout.ask(folders["decoder"], "cpu", question("word " * 70))
