"""How a model folder is loaded, by the files that it has."""

from __future__ import annotations

import pytest

from pipelines.modelio import load_instructions

PLAIN = ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]
PACKED = ["model/config.json", "model/packed-00001-of-00002.safetensors", "model/ingot_compression.json"]
TABLES = "model/kv_cache.safetensors"


def test_a_plain_folder_needs_no_code_of_ours() -> None:
    how = load_instructions.of_files([*PLAIN, "model/ingot_compression.json"])
    assert how.plain
    assert "no code of Ingot" in how.sentence
    assert "AutoModelForMaskedLM.from_pretrained(path)" in how.snippet("AutoModelForMaskedLM")
    assert "pipelines" not in how.snippet("AutoModelForCausalLM")


def test_a_packed_folder_needs_our_loader() -> None:
    how = load_instructions.of_files(PACKED)
    assert (how.packed, how.cache, how.plain) == (True, False, False)
    assert "no public loader" in how.sentence
    assert "load_model(Path(path))" in how.snippet("AutoModelForCausalLM")
    assert "new_cache" not in how.snippet("AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("files", "said"),
    [(PLAIN, "ignores that file: it keeps an ordinary cache"), (PACKED, "does not find the packed weights")],
)
def test_a_coded_cache_is_told_with_what_plain_transformers_does(files: list[str], said: str) -> None:
    how = load_instructions.of_files([*files, TABLES])
    assert not how.plain
    assert said in how.sentence
    assert "kv_cache.safetensors" in how.sentence
    assert "model.new_cache()" in how.snippet("AutoModelForCausalLM")


def test_words_that_only_begin_alike_mean_nothing() -> None:
    assert load_instructions.of_files([*PLAIN, "model/packed.json", "model/my_kv_cache.safetensors"]).plain
