"""Variants load in a fresh process with transformers alone, and are there what the stage says they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.compression.modules import packed_linear
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

CHILDREN = [
    {"method": "rtn"},
    {"method": "rtn", "bits": 4, "group_size": 64},
    {"method": "gptq", "symmetric": False},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "rtn", "bits": 6, "embeddings": "quantize"},
    {"method": "gptq", "embeddings": "bfloat16"},
]

MIXED = {"method": "hawq", "budget": 4.0, "group_size": 0, "samples": 8}
"""Widths of their own for the layers of a decoder; an encoder of mixed widths needs our loader."""


def plain_transformers(
    kind: str, tokens: Tensor, folders: list[Path], work: Path
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return (logits of each folder, what the process said)."""
    asked = work / "tokens.json"
    asked.write_text(json.dumps(tokens.tolist()))
    script = Path(__file__).with_name("load_variant.py")
    command = [sys.executable, str(script), kind, str(asked), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = [load_file(folder.parent / "logits.safetensors")["logits"] for folder in folders]
    return logits, json.loads(done.stdout.splitlines()[-1])


def dense_logits(parent: Path, variant: Path, tokens: Tensor) -> Tensor:
    """Return the logits of the base model with the variant's dequantized weights in it: no packed layer is involved."""
    model, reader = load_model(parent), WeightReader(variant)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(reader.dense(name))
    with torch.no_grad():
        return model(input_ids=tokens).logits


ROUNDED = [
    {"method": "int8", "calibrator": "p99.9"},
    {"method": "fp8"},
    {"method": "rtn", "bits": 4, "group_size": 64, "activations": "int8"},
    {"method": "gptq", "bits": 8, "group_size": 0, "activations": "int8", "skip": ["*.o_proj"]},
]
"""Variants whose layers round their inputs."""


def rounded_logits(parent: Path, variant: Path, tokens: Tensor, *, rounding: bool = True) -> Tensor:
    """Return the logits of the parent with the variant's packed layers in it, their inputs rounded or not."""
    model, reader = load_model(parent), WeightReader(variant)
    for name in reader.modules():
        packed_linear.put(model, name, reader.packed(name))
    if not rounding:
        for name in reader.modules():
            plain = torch.nn.Linear.forward.__get__(model.get_submodule(name))
            model.get_submodule(name).forward = plain
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_rounded_inputs_are_rounded_by_plain_transformers_too(
    small: Any, compress: Callable[..., Any], tmp_path: Path
) -> None:
    """Equal to float32 noise, far below what rounding itself does: a reader that skipped it would be found out."""
    bench = small()
    made = [compress(bench, table) for table in ROUNDED]
    assert all(report["loads_with"] == "transformers" for _, report in made)
    folders = [out / "model" for out, _ in made]
    logits, said = plain_transformers("AutoModelForCausalLM", bench.held_BT, folders, tmp_path)
    assert said["ours"] == []
    for table, folder, found in zip(ROUNDED, folders, logits, strict=True):
        ours = rounded_logits(bench.parent.path / "model", folder, bench.held_BT)
        skipped = rounded_logits(bench.parent.path / "model", folder, bench.held_BT, rounding=False)
        error, effect = float((found - ours).abs().mean()), float((skipped - ours).abs().mean())
        assert effect > 1e-4, table
        assert error < 0.02 * effect, (table, error, effect)


@pytest.mark.parametrize(
    "table",
    [{"method": "quik", "outliers": 0.125}, {"method": "fp8", "form": "e5m2"}, {"method": "int8"}, {"method": "fp8"}],
    ids=["quik", "e5m2", "int8", "fp8"],
)
def test_rounded_inputs_survive_our_loader(table: dict[str, Any], small: Any, compress: Callable[..., Any]) -> None:
    """The encoder needs it for every one: unpacking while loading, as transformers must there, forgets the inputs."""
    bench = small(family="encoder")
    out, report = compress(bench, table)
    assert report["loads_with"] == "pipelines.modelio.load"
    with torch.no_grad():
        logits = load_model(out / "model")(input_ids=bench.held_BT).logits
    assert torch.equal(logits, rounded_logits(bench.parent.path / "model", out / "model", bench.held_BT))
    skipped = rounded_logits(bench.parent.path / "model", out / "model", bench.held_BT, rounding=False)
    assert not torch.allclose(logits, skipped, atol=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_outputs_in_integers_survive_our_loader(family: str, small: Any, compress: Callable[..., Any]) -> None:
    """What a loaded layer returns is 8-bit codes times its stored scale, and near what its parent returns."""
    bench = small(family=family)
    out, report = compress(bench, {"method": "int8", "calibrator": "max", "rescale": "dyadic"})
    assert (report["loads_with"], report["layout"]) == ("pipelines.modelio.load", "ingot packed")
    model = load_model(out / "model")
    seen: dict[str, Tensor] = {}
    for name in report["layers"]:
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    with torch.no_grad():
        logits = model(input_ids=bench.held_BT).logits
        parent = load_model(bench.parent.path / "model")(input_ids=bench.held_BT).logits
    largest = []
    for name, y in seen.items():
        codes = y / WeightReader(out / "model").packed(name).tensors()["output_scale"]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        largest.append(float(codes.abs().max()))
    assert seen.keys() == report["layers"].keys()
    assert 100 < median(largest) <= max(largest) < 128.001, "the ranges fit the outputs"
    assert 0 < float((logits - parent).norm() / parent.norm()) < 0.1


@pytest.mark.parametrize(("family", "kind"), [("decoder", "AutoModelForCausalLM"), ("encoder", "AutoModelForMaskedLM")])
def test_variants_load_without_our_code_and_compute_the_dequantized_model(
    family: str, kind: str, small: Any, compress: Callable[..., Any], tmp_path: Path
) -> None:
    bench = small(family=family)
    tables = [*CHILDREN, MIXED] if family == "decoder" else CHILDREN
    made = [compress(bench, table) for table in tables]
    assert all(report["loads_with"] == "transformers" for _, report in made)
    folders = [out / "model" for out, _ in made]
    logits, said = plain_transformers(kind, bench.held_BT, folders, tmp_path)
    for table, folder, found in zip(tables, folders, logits, strict=True):
        assert torch.equal(found, dense_logits(bench.parent.path / "model", folder, bench.held_BT)), table
    assert said["ours"] == []
    lengths = [[len(row) for row in rows] for rows in said["generated"]]
    assert lengths == ([[6] * len(bench.held_BT)] * len(tables) if family == "decoder" else [])


def test_an_output_matrix_of_its_own_is_packed_like_the_embedding(
    small: Any, compress: Callable[..., Any], tmp_path: Path
) -> None:
    bench = small(tie_embeddings=False)
    out, _ = compress(bench, {"method": "rtn", "bits": 8, "embeddings": "quantize"})
    stored = load_file(out / "model" / "model.safetensors")
    assert {"lm_head.weight_packed", "model.embed_tokens.weight_packed"} <= set(stored)
    (logits,), _ = plain_transformers("AutoModelForCausalLM", bench.held_BT, [out / "model"], tmp_path)
    assert torch.equal(logits, dense_logits(bench.parent.path / "model", out / "model", bench.held_BT))


def test_a_bitmask_variant_is_refused_by_transformers_and_loaded_by_ours(
    small: Any, compress: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    bench = small()
    out, report = compress(bench, {"method": "wanda", "value_bits": 32, "storage": "bitmask"})
    assert report["loads_with"] == "pipelines.modelio.load"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        logits = load_model(out / "model")(input_ids=bench.held_BT).logits
    assert torch.equal(logits, dense_logits(bench.parent.path / "model", out / "model", bench.held_BT))


def test_a_width_that_groups_do_not_divide_gets_a_group_that_does(small: Any, compress: Callable[..., Any]) -> None:
    out, report = compress(small(), {"method": "rtn", "bits": 4, "group_size": 16})
    groups = json.loads((out / "model" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["group_size"] for group in groups.values()) == [8, 16]
    down = report["layers"]["model.layers.0.mlp.down_proj"]
    assert down["shape"] == [32, 88]
    assert down["bits_per_weight"] > report["layers"]["model.layers.0.mlp.up_proj"]["bits_per_weight"]


def test_tokenizer_and_generation_config_come_along(small: Any, compress: Callable[..., Any]) -> None:
    out, _ = compress(small(), {"method": "rtn"})
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (out / "model").iterdir()
    }
