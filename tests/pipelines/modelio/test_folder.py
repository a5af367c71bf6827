"""Reading and writing weights shard by shard."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.measure import scoring
from pipelines.modelio import folder, meta_init
from pipelines.modelio.folder import WeightReader, WeightWriter
from pipelines.modelio.load import load_model


def write(path: Path, *, shard_bytes: int) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{n}.weight": torch.full((4, 4), float(n)) for n in range(5)}
    writer = WeightWriter(path, shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return tensors


def test_small_weights_are_one_file(tmp_path: Path) -> None:
    tensors = write(tmp_path, shard_bytes=1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()


def test_large_weights_are_numbered_shards_with_an_index(tmp_path: Path) -> None:
    tensors = write(tmp_path, shard_bytes=128)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    reader = WeightReader(tmp_path)
    assert reader.names() == sorted(tensors)
    assert all(torch.equal(reader.dense(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_files_are_those_of_safetensors_byte_for_byte(tmp_path: Path) -> None:
    """Every type of tensor, in whatever order they come; an older attempt has left something behind."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{place}.{str(dtype).removeprefix('torch.')}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in map(functools.partial(getattr, torch), (name.removeprefix("torch.") for name in folder._NAMES))
        for place, shape in (("b", (3, 5)), ("a", ()), ("ä", (0, 2)))
    }
    (tmp_path / "model.spool").write_bytes(b"left behind")
    writer = WeightWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "reference"}


def test_shards_load_in_transformers(small: Any, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small()
    whole, _ = compress(bench, {"method": "rtn"})
    monkeypatch.setattr(WeightWriter.__init__, "__defaults__", (folder.PUBLIC_STEM, 20_000))
    parts, _ = compress(bench, {"method": "rtn"})
    assert len(list((parts / "model").glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        one, two = (load_model(path / "model")(input_ids=bench.held_BT).logits for path in (whole, parts))
    assert torch.equal(one, two)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="holds no safetensors"):
        WeightReader(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1 << 20)
    with pytest.raises(IntegrityError, match=r"'layer\.9\.weight'"):
        WeightReader(tmp_path).dense("layer.9.weight")


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    folder.write_json(tmp_path / folder.RECORD, {"format": 2, "layers": {}})
    with pytest.raises(IntegrityError, match="format 2"):
        folder.read_record(tmp_path)


def test_equal_json_gives_equal_bytes(tmp_path: Path) -> None:
    folder.write_json(tmp_path / "a", {"x": 1, "b": [2]})
    folder.write_json(tmp_path / "b", {"b": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_skeleton_has_no_weights_and_real_buffers(family: str, small: Any) -> None:
    source = small(family=family).parent.path / "model"
    model = meta_init.build(source)
    assert all(parameter.is_meta for parameter in model.parameters())
    reference = load_model(source)
    buffers = dict(reference.named_buffers())
    assert {name for name, _ in model.named_buffers()} == set(buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_building_a_skeleton_leaves_torch_as_it_was(small: Any) -> None:
    meta_init.build(small().parent.path / "model")
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, small: Any) -> None:
    config = json.loads((small().parent.path / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForPoetry"]}))
    with pytest.raises(IntegrityError, match="LlamaForPoetry"):
        meta_init.build(tmp_path)


def test_a_model_with_several_stacks_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with meta_init.parameters_on_meta():
        model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, vocab_size=32))
    with pytest.raises(ConfigError, match="has 2 stacks of 2 layers"):
        meta_init.blocks(model)


def test_a_folder_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(IntegrityError, match="BertForSequenceClassification"):
        folder.family_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_neither_written_nor_read(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.ones(4, 4)
    tensor[2, 3] = value
    tensor = tensor.to(dtype)
    with pytest.raises(NumericError, match=r"the weight a\.weight has 1 of 16 values"):
        WeightWriter(tmp_path).add("a.weight", tensor)
    save_file({"a.weight": tensor, "b.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    assert torch.equal(reader.dense("b.weight"), torch.ones(2))
    for read in (reader.refuse_not_finite, lambda: reader.dense("a.weight")):
        with pytest.raises(NumericError, match=r"model\.safetensors: the weight a\.weight has 1 of 16 values"):
            read()


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.ones(3, dtype=torch.int8), torch.tensor([True, False])])
def test_empty_tensors_integers_and_truth_values_are_finite(tensor: torch.Tensor, tmp_path: Path) -> None:
    WeightWriter(tmp_path).add("a.weight", tensor)


def test_a_public_folder_with_a_weight_that_is_not_finite_is_not_loaded(small: Any, tmp_path: Path) -> None:
    shutil.copytree(small().parent.path / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"the weight model\.norm\.weight has 1 of 32 values"):
        load_model(tmp_path / "model")
    with pytest.raises(NumericError, match=r"the weight model\.norm\.weight has 1 of 32 values"):
        scoring.load(tmp_path / "model", "cpu")
