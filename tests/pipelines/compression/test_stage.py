"""The stage: determinism, honest bytes, reports, refusals, and a memory bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, IntegrityError, NumericError
from pipelines.core.stage import Progress, StageContext
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.stages import STAGES
from tests.pipelines.compression.conftest import publish


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("table", [{"method": "gptq"}, {"method": "wanda"}, {"method": "rtn", "bits": 3}])
def test_two_runs_write_the_same_bytes(table: dict[str, Any], small: Any, compress: Callable[..., Any]) -> None:
    (one, _), (two, _) = compress(small(), table), compress(small(), table)
    assert bytes_of(one) == bytes_of(two)


def test_another_seed_calibrates_on_other_text(small: Any, compress: Callable[..., Any]) -> None:
    reports = [compress(small(), {"method": "gptq", "samples": 8, "seed": seed})[1] for seed in (0, 1)]
    assert reports[0]["errors"]["output"] != reports[1]["errors"]["output"]


def test_counted_bits_are_the_bytes_of_the_packed_tensors_on_disk(small: Any, compress: Callable[..., Any]) -> None:
    for table in ({"method": "gptq"}, {"method": "wanda", "value_bits": 16, "storage": "bitmask"}):
        out, report = compress(small(), table)
        (weights,) = (out / "model").glob("*.safetensors")
        stored = load_file(weights)
        for name, row in report["layers"].items():
            mine = [t for key, t in stored.items() if key.startswith(f"{name}.")]
            assert row["stored_bits"] == 8 * sum(t.numel() * t.element_size() for t in mine)
        assert report["totals"]["stored_bits"] == sum(row["stored_bits"] for row in report["layers"].values())
        assert report["totals"]["bytes"] == weights.stat().st_size


@pytest.mark.parametrize("table", [{"method": "rtn"}, {"method": "gptq", "samples": 4}])
def test_a_layer_is_read_twice_at_most(
    table: dict[str, Any], small: Any, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to see whether it is finite before work is spent on it, and once to be compressed."""
    reads: list[str] = []
    read = WeightReader._read
    monkeypatch.setattr(WeightReader, "_read", lambda self, name: reads.append(name) or read(self, name))
    _, report = compress(small(), table)
    assert {reads.count(f"{name}.weight") for name in report["layers"]} == {2}
    base, weights = report["totals"]["base_layer_bytes"], report["totals"]["weights"]
    assert base == 4 * weights


def test_whether_a_base_rounds_its_inputs_is_known_from_one_layer_of_a_kind(
    small: Any, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = small()
    rounded, _ = compress(bench, {"method": "rtn", "activations": "int8"})
    asked, packed = list[str](), WeightReader.packed
    monkeypatch.setattr(WeightReader, "packed", lambda self, name: asked.append(name) or packed(self, name))
    mixed, report = compress(bench, {"method": "quik", "samples": 4})
    parents = [publish(folder, "compress") for folder in (rounded, mixed)]
    asked.clear()
    for method in ("gptq", "paretoq", "optin"):
        with pytest.raises(ConfigError, match="rounds its inputs, which another method would forget"):
            compress(bench, {"method": method, "samples": 4}, parent=parents[0])
    assert len(asked) == 3, "one layer of a kind tells it"
    with pytest.raises(ConfigError, match="rounds its inputs"):
        compress(bench, {"method": "gptq", "samples": 4}, parent=parents[1])
    plain, _ = compress(bench, {"method": "rtn"})
    asked.clear()
    reader = WeightReader(plain / "model")
    assert not any(reader.packed(name).rounds_inputs for name in reader.storages())
    assert len(asked) == 1 < len(report["layers"])


def test_bits_of_the_whole_model_count_everything_that_is_stored(small: Any, compress: Callable[..., Any]) -> None:
    for table in ({"method": "rtn"}, {"method": "kvquant", "samples": 4}, {"method": "optin", "samples": 4}):
        bench = small()
        out, report = compress(bench, table)
        stored = sum(path.stat().st_size for path in (out / "model").glob("*.safetensors"))
        weights = meta_init.build(bench.parent.path / "model").num_parameters()
        assert report["totals"]["model_bits_per_weight"] == pytest.approx(8 * stored / weights)


@pytest.mark.parametrize(
    ("table", "least"),
    [
        ({"method": "rtn"}, 3.7),
        ({"method": "gptq", "group_size": 64}, 6.0),
        ({"method": "wanda"}, 3.7),
        ({"method": "wanda", "value_bits": 32, "storage": "bitmask"}, 1.85),
        ({"method": "wanda", "value_bits": 8, "storage": "bitmask"}, 5.9),
    ],
)
def test_layers_shrink_on_disk_as_claimed(
    table: dict[str, Any], least: float, small: Any, compress: Callable[..., Any]
) -> None:
    _, report = compress(small(width=128, ffn_width=256), table)
    totals = report["totals"]
    assert totals["layer_ratio"] > least
    assert totals["ratio"] == totals["base_bytes"] / totals["bytes"] > 1.5
    assert totals["base_layer_bytes"] - totals["layer_bytes"] == pytest.approx(
        totals["base_bytes"] - totals["bytes"], rel=0.02
    )


def test_embeddings_are_counted_and_halved_or_quantized_on_request(small: Any, compress: Callable[..., Any]) -> None:
    counted = {
        choice: compress(small(), {"method": "rtn", "embeddings": choice})[1]["totals"]["embedding_bytes"]
        for choice in ("keep", "bfloat16", "quantize")
    }
    assert counted["keep"] == 260 * 32 * 4
    assert counted["bfloat16"] == counted["keep"] // 2
    assert counted["quantize"] < 0.3 * counted["keep"]


def test_skipped_layers_are_kept_as_they_are(small: Any, compress: Callable[..., Any]) -> None:
    bench = small()
    out, report = compress(bench, {"method": "rtn", "bits": 2, "skip": ["*.down_proj", "model.layers.0.*"]})
    assert all("layers.1" in name and "down_proj" not in name for name in report["layers"])
    parent = load_file(bench.parent.path / "model" / "model.safetensors")
    child = load_file(out / "model" / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(child[name], parent[name])


def test_baselines_stand_beside_every_layer(small: Any, compress: Callable[..., Any]) -> None:
    for method, arms in (("gptq", {"rtn"}), ("wanda", {"magnitude", "random"})):
        _, report = compress(small(), {"method": method})
        assert set(report["errors"]["baselines"]) == arms
        for row in report["layers"].values():
            assert set(row["baselines"]) == arms
            assert row["output_error"] < max(row["baselines"].values())


def test_rtn_is_marked_as_its_own_baseline(small: Any, compress: Callable[..., Any]) -> None:
    _, report = compress(small(), {"method": "rtn"})
    assert report["not_informative"]
    assert report["calibration"]["sequences"] == 0


def test_the_record_of_a_child_does_not_hold_its_name(small: Any, compress: Callable[..., Any]) -> None:
    one, _ = compress(small(), {"method": "rtn", "name": "first"})
    two, _ = compress(small(), {"method": "rtn", "name": "second"})
    assert bytes_of(one) == bytes_of(two)


def test_every_block_is_reported(small: Any, tmp_path: Path) -> None:
    bench, seen = small(), list[Progress]()
    context = StageContext(node="compress.x", scratch=tmp_path, report=seen.append, compute=ComputeConfig(device="cpu"))
    summary = run(CompressConfig(), {"prepare": bench.prepare, "model": bench.parent}, tmp_path / "out", context)
    assert [(p.done, p.total, p.unit, p.node) for p in seen] == [(n, 2, "blocks", "compress.x") for n in (1, 2)]
    assert summary["totals"]["bits_per_weight"] < 10
    assert json.loads(json.dumps(summary)) == summary


def test_the_stage_is_found_by_its_entry() -> None:
    assert STAGES["compress"].body() is run


def test_a_child_of_a_child_starts_from_the_dequantized_weights(small: Any, compress: Callable[..., Any]) -> None:
    bench = small()
    first, _ = compress(bench, {"method": "rtn", "bits": 4})
    parent = artifact.publish(
        first, first.with_name("first"), stage="compress", node="c", identity={}, parents={}, summary={}
    )
    second, report = compress(bench, {"method": "rtn", "bits": 8, "clip": "max"}, parent=parent)
    name = "model.layers.0.mlp.up_proj.weight"
    one, two = (WeightReader(path / "model").dense(name) for path in (parent.path, second))
    assert (one - two).abs().max() < 0.01 * one.abs().max()
    assert report["totals"]["base_bytes"] < report["totals"]["bytes"]


def test_a_pattern_that_fits_no_layer_is_refused_with_layers_that_exist(
    small: Any, compress: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"'\*\.downproj' matches no layer") as error:
        compress(small(), {"method": "rtn", "skip": ["*.downproj"]})
    assert "self_attn.q_proj" in str(error.value.hint)


def test_skipping_everything_is_refused(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="leaves no layer"):
        compress(small(), {"method": "rtn", "skip": ["*"]})


def test_a_layer_that_a_method_does_not_fit_is_named(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj: a 2:4 pattern does not fit rows of 90"):
        compress(small(ffn_width=90), {"method": "wanda", "pattern": "2:4"})


def test_activations_that_overflow_stop_the_stage(small: Any, compress: Callable[..., Any], tmp_path: Path) -> None:
    bench = small()
    broken = tmp_path / "broken" / "model"
    broken.mkdir(parents=True)
    for path in (bench.parent.path / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    parent = artifact.publish(
        broken.parent, tmp_path / "bad", stage="pretrain", node="p", identity={}, parents={}, summary={}
    )
    with pytest.raises(NumericError, match=r"layers\.0\.mlp\.down_proj"):
        compress(bench, {"method": "gptq"}, parent=parent)


def test_damaged_weights_are_an_integrity_error(small: Any, compress: Callable[..., Any], tmp_path: Path) -> None:
    bench = small()
    broken = tmp_path / "broken" / "model"
    broken.mkdir(parents=True)
    for path in (bench.parent.path / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:100])
    (broken / "config.json").write_bytes((bench.parent.path / "model" / "config.json").read_bytes())
    parent = artifact.publish(
        broken.parent, tmp_path / "bad", stage="pretrain", node="p", identity={}, parents={}, summary={}
    )
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        compress(bench, {"method": "rtn"}, parent=parent)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_no_more_than_one_block_is_in_memory(
    family: str, small: Any, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count real (not meta) weights inside the stack at every load: one block at a time, whatever the depth."""
    bench = small(family=family, layers=5)
    peaks: list[int] = []
    load, built = meta_init.load, list[nn.Module]()
    build = meta_init.build

    def spy_build(folder: Path) -> Any:
        built.append(build(folder))
        return built[-1]

    def spy_load(module: nn.Module, *args: Any) -> None:
        load(module, *args)
        stacks = [meta_init.blocks(model)[1] for model in built]
        peaks.append(sum(any(not p.is_meta for p in block.parameters()) for stack in stacks for block in stack))

    monkeypatch.setattr(meta_init, "build", spy_build)
    monkeypatch.setattr(meta_init, "load", spy_load)
    compress(bench, {"method": "gptq"})
    assert peaks == [1] * 5
