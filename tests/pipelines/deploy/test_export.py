"""Export appears complete or not at all, in the chosen format, and says what loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines import artifact
from pipelines.artifact import Artifact
from pipelines.compression import loading
from pipelines.compression.config import CompressConfig
from pipelines.compression.load import load_model
from pipelines.compression.stage import run
from pipelines.data import shards
from pipelines.deploy import export
from pipelines.errors import ConfigError, IntegrityError
from pipelines.provenance import CHECKOUT
from pipelines.stage import StageContext

MakeModel = Callable[..., Artifact]


def child(parent: Artifact, folder: Path, table: dict[str, Any]) -> Artifact:
    """Compress a model with a method that needs no calibration."""
    (folder / "build").mkdir(parents=True)
    context = StageContext(node="compress.child", scratch=folder, compute={"device": "cpu"})
    run(
        CompressConfig.model_validate({"arms_documents": 0} | table),
        {"prepare": parent, "model": parent},
        folder / "build",
        context,
    )
    names = {"stage": "compress", "node": "compress.child", "identity": {}, "parents": {}, "summary": {}}
    return artifact.publish(folder / "build", folder / "final", **names)


def test_a_public_layout_is_copied_and_loads_in_transformers(model_artifact: MakeModel, tmp_path: Path) -> None:
    made = child(model_artifact(), tmp_path, {"method": "rtn", "bits": 8})
    said = export.write(made, tmp_path / "out")
    assert said == f"load it with transformers: from_pretrained('{tmp_path / 'out'}')"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (made.path / "model").iterdir()}
    code = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, capture_output=True, cwd=tmp_path)


def test_a_private_layout_says_that_it_needs_our_loader(model_artifact: MakeModel, tmp_path: Path) -> None:
    made = child(model_artifact(), tmp_path, {"method": "magnitude", "storage": "bitmask"})
    said = export.write(made, tmp_path / "out")
    assert "no public loader" in said
    assert "pipelines.compression.load" in said
    assert load_model(tmp_path / "out").num_parameters() == load_model(made.path / "model").num_parameters()


def test_a_coded_cache_is_used_by_the_snippet_and_ignored_by_plain_transformers(
    model_artifact: MakeModel, tmp_path: Path
) -> None:
    """The snippet of the model card runs in a checkout, generates, and holds less than plain transformers does."""
    parent = model_artifact()
    made = coded_child(parent, tmp_path)
    said = export.write(made, tmp_path / "out")
    assert "ignores that file: it keeps an ordinary cache of full size" in said
    assert f"load_model(Path('{tmp_path / 'out'}'))" in said
    code = f"path = {str(tmp_path / 'out')!r}\n" + loading.of(made).snippet("AutoModelForCausalLM")
    code += "model(output, past_key_values=cache, use_cache=True); print(output.shape[1], cache.stored_bytes)"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=CHECKOUT)
    tokens, stored = map(int, ran.stdout.splitlines()[-1].split())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(tokens).unsqueeze(0)
    layers = plain(input_ids=ids, use_cache=True).past_key_values.layers
    assert tokens > 50
    assert 0 < 3 * stored < sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    original = AutoModelForCausalLM.from_pretrained(parent.path / "model")
    assert torch.equal(plain(input_ids=ids).logits, original(input_ids=ids).logits)


def coded_child(parent: Artifact, folder: Path) -> Artifact:
    """Code the cache of a model, on tables fitted to noise."""
    prepare = folder / "prepare"
    prepare.mkdir()
    tokens = np.random.default_rng(0).integers(4, 260, (8, 32))
    entries = shards.write([tokens], prepare, "train", sequence_length=32, dtype="uint16", shard_bytes=10_000)
    split = {"train": {"shards": entries, "sequences": len(tokens)}}
    index = {"format": 1, "sequence_length": 32, "vocab_size": 300, "dtype": "uint16", "splits": split}
    index |= {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    (prepare / "index.json").write_text(json.dumps(index))
    names = {"stage": "prepare", "node": "prepare", "identity": {}, "parents": {}, "summary": {}}
    prepared = artifact.publish(prepare, folder / "prepared", **names)
    build = folder / "coded"
    build.mkdir()
    context = StageContext(node="compress.kv", scratch=folder, compute={"device": "cpu"})
    config = CompressConfig.model_validate({"method": "kvquant", "samples": 8, "arms_documents": 0})
    run(config, {"prepare": prepared, "model": parent}, build, context)
    return artifact.publish(build, folder / "kv", **(names | {"stage": "compress", "node": "compress.kv"}))


def test_gguf_is_one_file_and_says_how_its_tensors_are_stored(model_artifact: MakeModel, tmp_path: Path) -> None:
    said = export.write(model_artifact(), tmp_path / "deep" / "m.gguf", "gguf", "q8_0")
    assert (
        said == f"5 tensors f32, 15 tensors q8_0; load it with llama.cpp: llama-cli -m {tmp_path / 'deep' / 'm.gguf'}"
    )
    assert (tmp_path / "deep" / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_a_refused_family_leaves_nothing_behind(model_artifact: MakeModel, tmp_path: Path) -> None:
    for family, file_format in (("encoder", "gguf"), ("decoder", "onnx")):
        with pytest.raises(ConfigError, match="cannot be written as"):
            export.write(model_artifact(family=family), tmp_path / "out", file_format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file_format", "precision", "message", "valid"),
    [
        ("safetensors", None, "there is no format 'safetensors'", "hf, gguf, onnx"),
        ("gguf", "int8", "gguf has no precision 'int8'", "f16, f32, q8_0, q4_0"),
        ("hf", "f16", "hf has no precision 'f16'", "as stored"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(
    file_format: str, precision: str | None, message: str, valid: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        export.check(tmp_path / "out", file_format, precision)
    assert (
        "hf" in str(refused.value.hint) or "as stored" in str(refused.value.hint) or "q8_0" in str(refused.value.hint)
    )


def test_an_existing_destination_is_kept(model_artifact: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export.write(model_artifact(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_damaged_model_is_not_exported(model_artifact: MakeModel, tmp_path: Path) -> None:
    made = model_artifact()
    weights = made.path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        export.write(made, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())
