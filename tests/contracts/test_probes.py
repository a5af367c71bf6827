"""What every probe keeps to, whichever it is: the registry finds it, and this file asks the same of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig, Family
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.evaluation import probe
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.probe import Measurement, ProbeSettings, Subject
from pipelines.measure.heldout import Document, Heldout
from pipelines.measure.scoring import Scorer

FAMILIES: tuple[Family, ...] = ("decoder", "encoder")
VOCABULARY = 64
QUICK: Mapping[str, dict[str, Any]] = {"latency": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}}
"""Settings that make a probe quick; a new one needs none."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def documents() -> Heldout:
    """Twenty documents of random tokens."""
    generator = np.random.default_rng(0)
    tokens = tuple(generator.integers(4, VOCABULARY, size=n).astype(np.int64) for n in range(10, 30))
    texts = tuple(
        Document(id=f"document-{n}", text=" ".join(f"w{token}" for token in ids), source="s")
        for n, ids in enumerate(tokens)
    )
    index = {"sequence_length": 16, "vocab_size": VOCABULARY, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    return Heldout(texts, len(texts), tokens, index)


@pytest.fixture(scope="module")
def subjects(documents: Heldout, tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Subject]:
    """An untrained model of each family."""
    found: dict[Family, Subject] = {}
    for family in FAMILIES:
        config = ArchitectureConfig(
            family=family, width=16, layers=2, heads=2, ffn_width=24, vocab_size=VOCABULARY, max_positions=32,
            bos_id=0, eos_id=1, pad_id=2, mask_id=3,
        )  # fmt: skip
        model, folder = build(config, seed=1).eval(), tmp_path_factory.mktemp(family) / "model"
        model.save_pretrained(folder)
        _tokenizer().save(str(folder / "tokenizer.json"))
        scorer = Scorer(model, family, f"the {family}", "cpu")
        bootstrap = {"samples": 100, "seed": 0, "confidence": 0.9}
        found[family] = Subject(scorer, folder, documents, window=16, bootstrap=bootstrap)
    return found


def _tokenizer() -> Tokenizer:
    """Return a tokenizer whose words are its tokens."""
    words = ["<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>", *(f"w{n}" for n in range(4, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="w4"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def _settings(name: str) -> ProbeSettings:
    settings: ProbeSettings = probe.get(name).Settings.model_validate(QUICK.get(name, {}))
    return settings


def _evaluation(measured: Measurement, name: str, folder: Path) -> Artifact:
    """Publish what a probe keeps, as the stage does."""
    build = folder / "build"
    build.mkdir(parents=True)
    (build / "evaluation.json").write_text("{}")
    if measured.array is not None:
        np.save(build / f"{name}.npy", measured.array, allow_pickle=False)
    names = {"stage": "evaluate", "node": "evaluate", "identity": {}, "parents": {}, "summary": {}}
    return artifact.publish(build, folder / "final", **names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", probe.names())
def test_a_probe_measures_the_same_result_twice_or_refuses_by_name(
    name: str, family: Family, subjects: dict[Family, Subject], tmp_path: Path
) -> None:
    member, subject, settings = probe.get(name), subjects[family], _settings(name)
    if reason := member.refusal(subject):
        with pytest.raises(ConfigError, match=f"the probe '{name}' does not measure the {family}: ") as refused:
            member.measure(subject, settings)
        assert reason in str(refused.value)
        return
    first = member.measure(subject, settings)
    base = _evaluation(first, name, tmp_path)
    variant = Subject(**{**vars(subject), "base": base})
    rows = [member.measure(variant, settings) for _ in range(2)]
    assert first.versus_base == {}, "there is nothing to compare with"
    assert rows[0].result == rows[1].result == first.result
    assert rows[0].versus_base == rows[1].versus_base
    assert rows[0].rows == rows[1].rows == first.rows
    for row in (first, *rows):
        json.dumps(row.rows, allow_nan=False)
        json.dumps([dict(row.result), dict(row.versus_base), dict(row.observation)], allow_nan=False)
        assert row.result or row.observation, "a probe that says nothing of a model should refuse it"
        if first.array is None:
            assert row.array is None
        else:
            np.testing.assert_array_equal(row.array, first.array)
        if member.observes:
            assert (dict(row.result), dict(row.versus_base), row.array) == ({}, {}, None)


@pytest.mark.parametrize("name", probe.names())
def test_a_probe_says_whom_it_measures_and_describes_every_setting(name: str) -> None:
    member = probe.get(name)
    assert member.name == name
    assert member.families
    assert member.families <= set(FAMILIES)
    assert all(field.description for field in member.Settings.model_fields.values())
    assert EvaluateConfig.model_validate({"probes": {name: {}}}).probes[name] == member.Settings()


@pytest.mark.parametrize("name", probe.names())
def test_finding_a_probe_imports_neither_torch_nor_numpy(name: str) -> None:
    code = (
        f"import sys; from pipelines.evaluation import probe; probe.get({name!r});"
        "print([name for name in ('torch._C', 'numpy._core', 'transformers') if name in sys.modules])"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "[]", f"{name} imports them at its top: `ingot plan` would pay for it"
