"""ONNX folders as onnxruntime computes them, against the model folder that they were written from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.deploy import onnx as deploy
from pipelines.modelio.load import load_model

MakeModel = Callable[..., Artifact]
SHAPES = ((1, 64), (3, 17), (2, 2))


@pytest.fixture(scope="module")
def encoder(model_artifact: MakeModel) -> Path:
    """An encoder with local and global layers."""
    return model_artifact(family="encoder", layers=3, local_window=8).path / "model"


@pytest.fixture(scope="module")
def written(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The encoder as ONNX, by precision; int8 is made from the same graph."""
    root = tmp_path_factory.mktemp("onnx")
    (root / "fp32").mkdir()
    deploy.write(encoder, root / "fp32")
    shutil.copytree(root / "fp32", root / "int8")
    deploy.quantize(root / "int8" / deploy.MODEL)
    return {precision: root / precision for precision in ("fp32", "int8")}


def compare(folder: Path, encoder: Path, rows: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of visible tokens [N, vocabulary]: onnxruntime's and ours; every row but one is padded."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4, 260, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, tokens - tokens // 3 :] = 0
    session = onnxruntime.InferenceSession(str(folder / deploy.MODEL), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = load_model(encoder)(input_ids=ids, attention_mask=mask).logits.numpy()
    visible = mask.numpy().astype(bool)
    return found[visible], expected[visible]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onnxruntime_computes_the_logits_at_any_batch_and_length(
    shape: tuple[int, int], written: dict[str, Path], encoder: Path
) -> None:
    found, expected = compare(written["fp32"], encoder, *shape)
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_int8_logits_stay_close_and_are_really_computed_in_integers(written: dict[str, Path], encoder: Path) -> None:
    """Relative error of the logits: measured 0.015; fp32 above is 1e-6."""
    found, expected = compare(written["int8"], encoder, 3, 17)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
    kinds = [node.op_type for node in onnx.load(written["int8"] / deploy.MODEL).graph.node]
    assert kinds.count("MatMulInteger") == 3 * 4 + 1, "four matrices a layer and the head"


def test_int8_matrices_have_a_scale_a_column_and_use_its_whole_range(written: dict[str, Path]) -> None:
    """Matrices are [inputs, outputs] here, so a row of the model is a column of the graph."""
    initial = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(written["int8"] / deploy.MODEL).graph.initializer
    }
    stored = {name: array for name, array in initial.items() if array.dtype == np.int8 and array.ndim == 2}
    assert len(stored) == 13
    for name, array in stored.items():
        assert initial[name.replace("_quantized", "_scale")].shape == (array.shape[1],)
        assert np.abs(array.astype(int)).max(axis=0).min() >= (63 if deploy.reduced() else 127)


def test_the_folder_has_what_a_program_needs_beside_the_graph(written: dict[str, Path]) -> None:
    for folder in written.values():
        assert {"model.onnx", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
        assert not [path for path in folder.iterdir() if path.suffix in {".float", ".data", ".safetensors"}]


def test_a_decoder_is_refused_by_name_with_the_format_that_fits(model_artifact: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM") as refused:
        deploy.write(model_artifact().path / "model", tmp_path)
    assert "gguf" in str(refused.value.hint)
