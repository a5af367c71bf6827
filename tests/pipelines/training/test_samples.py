"""What the model says after each validation, and that asking it changes nothing of the training."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from pipelines.core.artifact import Artifact
from pipelines.data.shards import ShardReader
from pipelines.training.metrics import read_records

Run = Callable[..., int]


def special(tokenizer: Tokenizer) -> set[int]:
    """The ids that are no text."""
    return {token for token, about in tokenizer.get_added_tokens_decoder().items() if about.special}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decoder_goes_on_with_a_validation_text_as_its_stored_model_does(
    precision: str, run_plain: Run, prepared: Artifact, tmp_path: Path
) -> None:
    assert run_plain(tmp_path, precision=precision) == 0
    records = read_records(tmp_path / "samples.jsonl")
    assert [record["step"] for record in records] == [3, 6]
    tokens = ShardReader(prepared.path, "validation").take(np.zeros(1, dtype=np.int64))[0].tolist()
    tokenizer = Tokenizer.from_file(str(prepared.path / "tokenizer" / "tokenizer.json"))
    assert {record["prompt"] for record in records} == {tokenizer.decode(tokens[:12], skip_special_tokens=True)}
    if precision == "bf16":
        return  # the stored weights are rounded, those that were asked are not
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens[:12]
    with torch.no_grad():
        while len(ids) < 24:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    written = list(itertools.takewhile(lambda token: token not in special(tokenizer), ids[12:]))
    assert records[-1]["text"] == tokenizer.decode(written)


def test_an_encoder_fills_in_the_masks_of_a_validation_text(run_plain: Run, prepared: Artifact, tmp_path: Path) -> None:
    assert run_plain(tmp_path, family="encoder") == 0
    records = read_records(tmp_path / "samples.jsonl")
    assert [record["step"] for record in records] == [3, 6]
    tokenizer = Tokenizer.from_file(str(prepared.path / "tokenizer" / "tokenizer.json"))
    words = iter(records[-1]["prompt"].split())
    tokens = ShardReader(prepared.path, "validation").take(np.zeros(1, dtype=np.int64))[0][:64].tolist()
    unseen = special(tokenizer) - {3}
    shown = [token if token in unseen else tokenizer.token_to_id(next(words)) or 0 for token in tokens]
    assert 3 in shown
    assert unseen.intersection(shown)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        likeliest = model(torch.tensor([shown])).logits[0].argmax(-1).tolist()
    filled = [guess if token == 3 else token for token, guess in zip(shown, likeliest, strict=True)]
    assert records[-1]["text"] == tokenizer.decode([token for token in filled if token not in unseen])


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_asking_changes_no_byte_of_the_training(family: str, run_plain: Run, tmp_path: Path) -> None:
    for name, samples in (("asked", True), ("left", False)):
        torch.manual_seed(1)
        assert run_plain(tmp_path / name, family=family, samples=samples) == 0
    facts, weights = (
        [hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for name in ("asked", "left")]
        for file in ("training.json", "model/model.safetensors")
    )
    assert facts[0] == facts[1]
    assert weights[0] == weights[1]
    assert not (tmp_path / "left" / "samples.jsonl").exists()
    seconds = [json.loads((tmp_path / name / "observations.json").read_text())["seconds"] for name in ("asked", "left")]
    assert ["sample" in each for each in seconds] == [True, False]
