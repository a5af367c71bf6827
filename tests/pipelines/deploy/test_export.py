"""Export appears complete or not at all, in the chosen format, and says what loads it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.deploy import export
from pipelines.modelio import load_instructions
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

MakeModel = MakeVariant = Callable[..., Artifact]


def test_a_public_layout_is_copied_and_loads_in_transformers(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    made = variant(model_artifact(), tmp_path / "variant", {"method": "rtn", "bits": 8})
    said = export.write(made, tmp_path / "out")
    needs = "pip install torch transformers compressed-tensors"
    assert said == f"load it with transformers: from_pretrained('{tmp_path / 'out'}'); needs: {needs}"
    names = {p.name for p in (made.path / "model").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"README.md"}
    code = "import sys; from transformers import AutoConfig, AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, capture_output=True, cwd=tmp_path)


def test_a_private_layout_says_that_it_needs_our_loader(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    made = variant(model_artifact(), tmp_path / "variant", {"method": "magnitude", "storage": "bitmask"})
    said = export.write(made, tmp_path / "out")
    assert "no public loader" in said
    assert "pipelines.modelio.load" in said
    assert load_model(tmp_path / "out").num_parameters() == load_model(made.path / "model").num_parameters()


def test_a_coded_cache_is_used_by_the_snippet_and_ignored_by_plain_transformers(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    """The snippet of the model card runs in a checkout, generates, and holds less than plain transformers does."""
    parent = model_artifact()
    made = variant(parent, tmp_path / "variant", {"method": "kvquant"})
    said = export.write(made, tmp_path / "out")
    assert "ignores that file: it keeps an ordinary cache of full size" in said
    assert f"load_model(Path('{tmp_path / 'out'}'))" in said
    code = f"path = {str(tmp_path / 'out')!r}\n" + load_instructions.of(made).snippet("AutoModelForCausalLM")
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
        ("safetensors", None, "there is no format 'safetensors'", "hf, gguf, onnx, torchao"),
        ("gguf", "int8", "gguf has no precision 'int8'", "f16, f32, q8_0, q4_0"),
        ("torchao", "fp8", "torchao has no precision 'fp8'", "int8, int8-dynamic, int4"),
        ("hf", "f16", "hf has no precision 'f16'", "as stored"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(
    file_format: str, precision: str | None, message: str, valid: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        export.check(tmp_path / "out", file_format, precision)
    assert valid in str(refused.value.hint)


ROUNDED = {
    "int8": ({"method": "int8"}, r"14 layers of this variant round their inputs \(int8, a fixed scale\)"),
    "w8a8": (
        {"method": "rtn", "bits": 8, "group_size": 0, "activations": "int8"},
        r"14 layers of this variant round their inputs \(int8, a scale for each token\)",
    ),
    "quik": ({"method": "quik"}, r"activations are not quantized there: \d+ layers"),
    "kvquant": ({"method": "kvquant"}, "its attention cache is not quantized there"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_gguf_leaves_out_is_refused_unless_weights_alone_are_wanted(
    name: str, model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    table, said = ROUNDED[name]
    made = variant(model_artifact(), tmp_path / "variant", table)
    with pytest.raises(ConfigError, match=said) as refused:
        export.write(made, tmp_path / "m.gguf", "gguf", "f32")
    assert "--weights-only" in str(refused.value.hint)
    assert not (tmp_path / "m.gguf").exists()
    told = export.write(made, tmp_path / "m.gguf", "gguf", "f32", weights_only=True)
    assert "; weights only: " in told
    assert re.search(said, told)
    assert (tmp_path / "m.gguf").is_file()


def test_the_file_that_was_told_to_be_weights_alone_computes_with_inputs_as_they_are(
    model_artifact: MakeModel, variant: MakeVariant, llama_cpp: Any, transformers_logits: Any, tmp_path: Path
) -> None:
    """llama.cpp on the file: the logits of the variant's weights in a plain model, not those of the variant."""
    made = variant(model_artifact(), tmp_path / "variant", {"method": "int8"})
    export.write(made, tmp_path / "m.gguf", "gguf", "f32", weights_only=True)
    tokens = [0, 17, 42, 5, 99, 120, 7, 8]
    found = llama_cpp(tmp_path / "m.gguf").logits(tokens)
    plain = WeightReader(made.path / "model")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_artifact().path / "model"))
    model.load_state_dict({name: plain.dense(name) for name in plain.names()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        alone = model.eval()(input_ids=torch.tensor([tokens])).logits[0].numpy()
    near, far = (
        float(np.abs(found - other).max()) for other in (alone, transformers_logits(made.path / "model", tokens))
    )
    assert near < 1e-4
    assert far > 10 * near


def test_torchao_says_rounded_inputs_only_where_it_rounds_them_alike(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    table = {"method": "rtn", "bits": 8, "group_size": 0, "activations": "int8"}
    dynamic = variant(model_artifact(), tmp_path / "dynamic", table)
    said = export.write(dynamic, tmp_path / "a", "torchao", "int8-dynamic")
    assert said.startswith("14 matrices taken over (int8-dynamic); load it with transformers and torchao: ")
    assert said.endswith(f"from_pretrained('{tmp_path / 'a'}')")
    for made, precision in (
        (dynamic, "int8"),
        (variant(model_artifact(), tmp_path / "static", {"method": "int8"}), "int8-dynamic"),
        (variant(model_artifact(), tmp_path / "groups", table | {"bits": 4, "group_size": 32}), "int8-dynamic"),
    ):
        with pytest.raises(ConfigError, match="activations are not quantized there: 14 layers"):
            export.write(made, tmp_path / "b", "torchao", precision)


def test_a_variant_that_rounds_weights_alone_is_written_without_a_word(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path: Path
) -> None:
    made = variant(model_artifact(), tmp_path / "variant", {"method": "rtn", "bits": 4, "group_size": 32})
    for file_format in ("gguf", "torchao"):
        assert "only" not in export.write(made, tmp_path / file_format, file_format)


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
