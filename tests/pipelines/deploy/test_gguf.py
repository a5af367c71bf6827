"""GGUF files as llama.cpp computes them, against the model folder that they were written from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.stage import StageContext
from pipelines.data import tokenizer
from pipelines.data.config import TokenizerTraining
from pipelines.deploy import gguf as deploy

MakeModel = Callable[..., Artifact]
TOKENS = [0, *range(40, 100)]
TEXTS = (
    "In the beginning God created the heaven and the earth.",
    "1611: 3 rooms, caf\u00e9 \u00bd \u6587\u5b57 \U0001f600!",
    "  two  spaces\n\n\ttabs \r\n and an end ",
    "don't we'll I'm x=1;y=22 <|bos|> ...",
)


SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv_heads": 2, "rope_theta": 50000.0},
    "untied": {"tie_embeddings": False},
    "small heads": {"head_width": 8},
    "large heads": {"heads": 2, "kv_heads": 1, "head_width": 48},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_llama_cpp_computes_the_logits_of_the_folder(
    sizes: dict[str, Any], model_artifact: MakeModel, llama_cpp: Any, transformers_logits: Any, tmp_path: Path
) -> None:
    folder = model_artifact(**sizes).path / "model"
    deploy.write(folder, tmp_path / "m.gguf", "f32")
    expected = transformers_logits(folder, TOKENS)
    reader = llama_cpp(tmp_path / "m.gguf")
    found = reader.logits(TOKENS)
    assert np.abs(expected).max() > 1.0, "logits near zero would hide a wrong order of rows"
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_unpermuted_queries_would_be_seen(
    model_artifact: MakeModel, llama_cpp: Any, transformers_logits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can tell: without the reordering for the other rotation, logits are plainly wrong."""
    folder = model_artifact().path / "model"
    monkeypatch.setattr(deploy, "interleave", lambda weight_OI, _: weight_OI)
    deploy.write(folder, tmp_path / "m.gguf", "f32")
    expected = transformers_logits(folder, TOKENS)
    reader = llama_cpp(tmp_path / "m.gguf")
    assert np.abs(reader.logits(TOKENS) - expected).max() > 0.05 * np.abs(expected).max()


def test_interleaving_puts_the_two_halves_of_a_head_side_by_side() -> None:
    rows = np.arange(16.0)[:, None].repeat(3, axis=1)
    order = deploy.interleave(rows, heads=2)[:, 0]
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(
    text: str, model_artifact: MakeModel, llama_cpp: Any, tmp_path: Path
) -> None:
    folder = model_artifact().path / "model"
    deploy.write(folder, tmp_path / "m.gguf", "f16")
    expected = tokenizer.encode(Tokenizer.from_file(str(folder / "tokenizer.json")), [text])[0]
    reader = llama_cpp(tmp_path / "m.gguf")
    assert reader.tokens(text) == expected
    assert reader.tokens(text, add_special=True) == [0, *expected], "documents start with <|bos|>"


@pytest.mark.parametrize("single_digits", [False, True])
@pytest.mark.parametrize("words", ["llama3", "gpt2"])
def test_llama_cpp_knows_every_kind_of_word_that_prepare_cuts(
    words: str, single_digits: bool, model_artifact: MakeModel, llama_cpp: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_artifact(vocab_size=420).path / "model", folder)
    settings = TokenizerTraining.model_validate({"pre_tokenizer": words, "single_digits": single_digits})
    texts = [*TEXTS, "we'LL'S 12345 67x890, y\u0301 a.b(c) _d__ 3.14\n\n\n  z"]
    trained = tokenizer.train([text * 5 for text in texts], 420, settings)
    trained.save(folder, 64)
    deploy.write(folder, tmp_path / "m.gguf", "f16")
    reader = llama_cpp(tmp_path / "m.gguf")
    for text, expected in zip(texts, tokenizer.encode(trained.tokenizer, texts), strict=True):
        assert reader.tokens(text) == expected


def test_ids_without_a_token_are_unused_in_the_file(
    model_artifact: MakeModel, llama_cpp: Any, transformers_logits: Any, tmp_path: Path
) -> None:
    """Holes in the middle and rows after the last token: both lists have an entry for every row of the matrix."""
    folder = tmp_path / "model"
    shutil.copytree(model_artifact(vocab_size=320).path / "model", folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = description["model"]["vocab"]
    last = max(vocabulary, key=lambda text: vocabulary[text])
    hole = vocabulary[last]
    vocabulary[last] = 310
    (folder / "tokenizer.json").write_text(json.dumps(description))
    deploy.write(folder, tmp_path / "m.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 320
    unused = {n for n, kind in enumerate(types) if kind == gguf.TokenType.UNUSED}
    assert unused == {hole, *range(hole + 1, 310), *range(311, 320)}
    assert (tokens[hole], types[310]) == (f"<|unused-{hole}|>", gguf.TokenType.NORMAL)
    reader = llama_cpp(tmp_path / "m.gguf")
    expected = tokenizer.encode(Tokenizer.from_file(str(folder / "tokenizer.json")), [TEXTS[0]])[0]
    assert reader.tokens(TEXTS[0]) == expected
    logits = transformers_logits(folder, [0, 310, *TOKENS[1:]])
    np.testing.assert_allclose(reader.logits([0, 310, *TOKENS[1:]]), logits, atol=2e-4 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("precision", "bits", "step"), [("f16", 16, 1e-3), ("q8_0", 8.5, 1 / 127), ("q4_0", 4.5, 1 / 8)], ids=str
)
def test_a_matrix_is_stored_in_the_bits_and_the_error_of_its_type(
    precision: Any, bits: float, step: float, model_artifact: MakeModel, tmp_path: Path
) -> None:
    """Scales are float16: q8_0 is off by half a step and 127 x 2^-11 of one; q4_0, with levels -8..7, by a step."""
    from pipelines.modelio.folder import WeightReader

    folder = model_artifact().path / "model"
    used = deploy.write(folder, tmp_path / "m.gguf", precision)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    name = "blk.1.ffn_down.weight"
    weight = WeightReader(folder).dense("model.layers.1.mlp.down_proj.weight").numpy()
    found = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(weight.shape)
    assert stored[name].n_bytes == weight.size * bits / 8
    blocks = (len(weight), -1, deploy.BLOCK)
    scale = np.abs(weight.reshape(blocks)).max(-1, keepdims=True)
    error = np.abs(found - weight).reshape(blocks)
    assert (error <= (1.0 if precision == "q4_0" else 0.57) * step * scale + 1e-6).all()
    assert used["f32"] == 5, "the gains of five norms"
    assert stored["token_embd.weight"].tensor_type.name == {"q4_0": "Q8_0"}.get(precision, precision.upper())


def test_rows_that_blocks_do_not_divide_are_stored_as_f16(
    model_artifact: MakeModel, llama_cpp: Any, transformers_logits: Any, tmp_path: Path
) -> None:
    folder = model_artifact(ffn_width=88).path / "model"
    used = deploy.write(folder, tmp_path / "m.gguf", "q8_0")
    assert used == {"f16": 2, "f32": 5, "q8_0": 13}
    expected = transformers_logits(folder, TOKENS)
    reader = llama_cpp(tmp_path / "m.gguf")
    assert np.abs(reader.logits(TOKENS) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "worst"), [("f32", 1e-5), ("f16", 1e-3), ("q8_0", 5e-3), ("q4_0", 0.06)], ids=str
)
def test_a_trained_model_keeps_its_loss_in_llama_cpp(
    precision: Any, worst: float, bench: Any, llama_cpp: Any, tmp_path: Path
) -> None:
    """Held-out nats per byte beside transformers: f32 equal, f16 and q8_0 nearly, q4_0 within 0.06 (measured 0.02)."""
    folder = bench.parent.path / "model"
    deploy.write(folder, tmp_path / "m.gguf", precision)
    rows = bench.held_BT[::12]
    reader = llama_cpp(tmp_path / "m.gguf")
    losses = [_loss(reader.logits(row), row) for row in rows.tolist()]
    few = type(bench)(bench.prepare, bench.parent, rows)
    from pipelines.modelio.load import load_model

    assert float(np.mean(losses)) == pytest.approx(few.loss(load_model(folder)), abs=worst)


def test_a_compressed_variant_is_written_as_it_computes(
    bench: Any, llama_cpp: Any, transformers_logits: Any, tmp_path: Path
) -> None:
    config = CompressConfig.model_validate({"method": "rtn", "bits": 4, "group_size": 32, "baseline_documents": 0})
    (tmp_path / "variant").mkdir()
    context = StageContext(node="compress.variant", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
    run(config, {"prepare": bench.prepare, "model": bench.parent}, tmp_path / "variant", context)
    deploy.write(tmp_path / "variant" / "model", tmp_path / "m.gguf", "f32")
    row = bench.held_BT[0].tolist()
    expected = transformers_logits(tmp_path / "variant" / "model", row)
    reader = llama_cpp(tmp_path / "m.gguf")
    np.testing.assert_allclose(reader.logits(row), expected, atol=1e-3)
    parent = transformers_logits(bench.parent.path / "model", row)
    assert np.abs(parent - expected).max() > 0.02, "the variant differs from its parent, so the parent was not written"


def test_an_encoder_is_refused_by_name(model_artifact: MakeModel, tmp_path: Path) -> None:
    folder = model_artifact(family="encoder").path / "model"
    with pytest.raises(ConfigError, match="ModernBertForMaskedLM"):
        deploy.write(folder, tmp_path / "m.gguf")


def test_a_tokenizer_of_another_kind_is_refused(model_artifact: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_artifact().path / "model", folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(r"\\p{N}{1,3}", r"\\p{N}{1,4}"))
    with pytest.raises(ConfigError, match="cut texts differently"):
        deploy.write(folder, tmp_path / "m.gguf")


def test_the_same_model_gives_the_same_bytes(model_artifact: MakeModel, tmp_path: Path) -> None:
    folder = model_artifact().path / "model"
    for name in ("one", "two"):
        deploy.write(folder, tmp_path / name, "q8_0")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def _loss(logits_TV: np.ndarray, tokens: list[int]) -> float:
    """Nats per token of the tokens after the first."""
    shifted = logits_TV[:-1].astype(np.float64)
    top = shifted.max(-1, keepdims=True)
    log_sum = np.log(np.exp(shifted - top).sum(-1)) + top[:, 0]
    return float((log_sum - shifted[np.arange(len(tokens) - 1), tokens[1:]]).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'linear'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ],
)
def test_what_a_plain_llama_would_compute_otherwise_is_refused(
    change: dict[str, Any], message: str, model_artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_artifact().path / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        deploy.write(folder, tmp_path / "x.gguf", "f32", title="x", licence="other")
