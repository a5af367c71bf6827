"""Export appears complete or not at all, in the chosen format, and says what loads it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import artifact
from pipelines.artifact import Artifact
from pipelines.compression.config import CompressConfig
from pipelines.compression.load import load_model
from pipelines.compression.stage import run
from pipelines.deploy import export
from pipelines.errors import ConfigError, IntegrityError
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
