"""The contract of every weight method that the registry finds: a new one is tested before its author writes a test.

Each runs with its defaults on one layer with correlated inputs, and through the stage on a small decoder and encoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import registry
from models.compression.base import Calibration, Kind, Packed, Statistics, WeightMethod, relative_error
from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, NumericError
from pipelines.core.stage import StageContext
from pipelines.data import shards
from pipelines.data.packing import Block
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model
from tests.fake_device import DEVICE, FakeDevice, host

IDS = {"bos_id": 60, "eos_id": 61, "pad_id": 62, "mask_id": 63}
WEIGHT_METHODS = registry.names("weight")
Method = WeightMethod[Any]


@pytest.fixture(params=WEIGHT_METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Every weight method."""
    return registry.weight(request.param)


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics]:
    """A weight [64, 128] and all statistics of correlated inputs with uneven channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(128) + torch.randn(128, 128, generator=generator) / 128**0.5
    scale = torch.exp(0.7 * torch.randn(128, generator=generator))
    inputs = torch.randn(800, 128, generator=generator) @ mixing * scale
    moment = inputs.double().T @ inputs.double()
    weight, fisher = torch.randn(64, 128, generator=generator), torch.rand(64, 128, generator=generator)
    return weight, Statistics(moment, 800, inputs_NI=inputs, reference_NI=inputs, fisher_OI=fisher * moment.diag())


@pytest.mark.parametrize("name", registry.names())
def test_a_method_says_what_it_is(name: str) -> None:
    method = registry.get(name)
    assert method.name == name
    assert method.kind in get_args(Kind)
    assert method.calibration in get_args(Calibration)
    assert method.bits
    assert method.paper
    assert sys.modules[type(method).__module__].__doc__


@pytest.mark.parametrize("name", registry.names())
def test_a_configuration_is_frozen_closed_described_and_json(name: str) -> None:
    kind = registry.get(name).Config
    config = kind()
    assert issubclass(kind, BaseModel)
    assert all(field.description for field in kind.model_fields.values())
    assert kind.model_validate(json.loads(config.model_dump_json())) == config
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind(no_such_parameter=1)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(kind.model_fields), "anything"), 1)


def test_compression_is_deterministic_and_leaves_its_input_alone(method: Method, layer: Any) -> None:
    weight, seen = layer
    before = weight.clone()
    one, two = (method.compress(weight, seen, method.Config()).tensors() for _ in range(2))
    assert torch.equal(weight, before)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_layer_stays_on_its_device_and_the_numbers_are_those_of_the_cpu(method: Method, layer: Any) -> None:
    """On a device that refuses to meet a tensor of the CPU, as CUDA does: nothing is made elsewhere or taken back."""
    weight, seen = layer
    config = method.Config()
    packed, others = method.compress(weight, seen, config), method.baselines(weight, seen, config)
    with FakeDevice() as fake:
        there = {key: v.to(DEVICE) if isinstance(v, Tensor) else v for key, v in vars(seen).items()}
        moved = weight.to(DEVICE), Statistics(**there), config
        made, others_made = method.compress(*moved), method.baselines(*moved)
        pairs = [(made, packed), *((others_made[name], other) for name, other in others.items())]
        for mine, expected in pairs:
            assert mine.dequantize().device == DEVICE
            assert torch.equal(host(mine.dequantize()), expected.dequantize())
        large = [shape for shape in fake.to_host if len(shape) > 1]
        assert not large, "copied to the host"


def test_the_packed_round_trip_is_bit_exact(method: Method, layer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weight, seen = layer
    packed: Packed = method.compress(weight, seen, method.Config())
    save_file(packed.tensors(), tmp_path / "layer.safetensors")
    again = method.restore(load_file(tmp_path / "layer.safetensors"), method.Config())
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert torch.equal(packed.widened().dequantize(), packed.dequantize())


def test_counted_bits_are_the_bytes_of_what_is_stored(method: Method, layer: Any) -> None:
    weight, seen = layer
    packed: Packed = method.compress(weight, seen, method.Config())
    size = sum(len(tensor.contiguous().view(torch.uint8).flatten()) for tensor in packed.tensors().values())
    assert packed.stored_bits() == 8 * size
    assert packed.stored_bits() < 0.6 * 32 * weight.numel()


def test_the_method_does_something_and_not_too_much(method: Method, layer: Any) -> None:
    weight, seen = layer
    dense = method.compress(weight, seen, method.Config()).dequantize()
    assert dense.shape == weight.shape
    assert dense.dtype == torch.float32
    assert bool(torch.isfinite(dense).all())
    assert 0 < relative_error(weight, dense, seen.hessian_II) < 0.5


def test_the_method_is_better_than_its_baselines_at_equal_bits(method: Method, layer: Any) -> None:
    weight, seen = layer
    config = method.Config()
    packed, baselines = method.compress(weight, seen, config), method.baselines(weight, seen, config)
    assert bool(baselines) != bool(method.not_informative), "baselines, or in not_informative why there are none"
    error = relative_error(weight, packed.dequantize(), seen.hessian_II)
    for name, baseline in baselines.items():
        assert baseline.stored_bits() == packed.stored_bits(), name
        assert error < relative_error(weight, baseline.dequantize(), seen.hessian_II), name


def test_missing_calibration_is_refused_by_name(method: Method, layer: Any) -> None:
    weight, _ = layer
    if method.calibration == "none":
        assert method.compress(weight, Statistics(), method.Config()).dequantize().shape == weight.shape
    else:
        with pytest.raises(ValueError, match=f"{method.name} needs calibration"):
            method.compress(weight, Statistics(), method.Config())


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Splits of random tokens, one to train and calibrate on and one to compare on."""
    folder = tmp_path_factory.mktemp("prepare") / "build"
    folder.mkdir()
    tokens = torch.randint(0, 60, (8, 32), generator=torch.Generator().manual_seed(0)).numpy()
    splits = {
        name: {
            "shards": shards.write(
                [Block.of_rows(tokens)], folder, name, sequence_length=32, dtype="uint16", shard_bytes=4096
            )
        }
        for name in ("train", "validation")
    }
    index = {"format": 1, "sequence_length": 32, "vocab_size": 64, "dtype": "uint16"} | IDS
    (folder / "index.json").write_text(json.dumps(index | {"splits": splits}))
    return _publish(folder)


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small model of either family."""
    shape = ArchitectureConfig(
        family=request.param, width=32, layers=2, heads=2, ffn_width=64, vocab_size=64, max_positions=32, **IDS
    )
    folder = tmp_path_factory.mktemp(request.param) / "build"
    build(shape, seed=0).save_pretrained(folder / "model")
    return _publish(folder)


def test_both_families_are_compressed_or_refused_by_name(
    method: Method, prepare: Artifact, parent: Artifact, tmp_path: Path
) -> None:
    name = method.name
    context = StageContext(node="compress.x", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
    config = CompressConfig.model_validate({"method": name})
    try:
        run(config, {"prepare": prepare, "model": parent}, tmp_path, context)
    except ConfigError as error:
        assert name in str(error)  # noqa: PT017 - a refusal is one of the two right answers
        return
    report = json.loads((tmp_path / "compression.json").read_text())
    assert report["totals"]["layers"] == len(report["layers"]) > 0
    assert report["totals"]["bytes"] < report["totals"]["base_bytes"]
    model, reader = load_model(tmp_path / "model"), WeightReader(tmp_path / "model")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(32).unsqueeze(0)).logits
    assert bool(torch.isfinite(logits).all())
    for layer_name in report["layers"]:
        assert torch.equal(model.get_parameter(f"{layer_name}.weight"), reader.dense(f"{layer_name}.weight"))


@pytest.mark.parametrize("name", registry.names("training"))
def test_a_method_that_trains_packs_the_same_variant_twice_and_counts_its_bytes(
    name: str, prepare: Artifact, parent: Artifact, tmp_path: Path
) -> None:
    """Without a step of training, which is tested where ranks are: `tests/pipelines/compression/test_training.py`."""
    config = CompressConfig.model_validate({"method": name, "steps": 0, "baselines": False})
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        context = StageContext(
            node="compress.x", scratch=tmp_path / place / "scratch", compute=ComputeConfig(device="cpu")
        )
        run(config, {"prepare": prepare, "model": parent}, tmp_path / place, context)
    one, two = (sorted((tmp_path / place / "model").glob("*")) for place in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    report = json.loads((tmp_path / "one" / "compression.json").read_text())
    assert report["totals"]["bytes"] == sum(path.stat().st_size for path in one if path.suffix == ".safetensors")
    assert report["totals"]["layers"] == len(report["layers"]) > 0
    assert "comparison" not in report, "there are no validation documents to compare on"
    with torch.no_grad():
        logits = load_model(tmp_path / "one" / "model")(input_ids=torch.arange(32).unsqueeze(0)).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", registry.names("training"))
def test_the_baselines_of_a_method_that_trains_are_variants_that_can_be_made(name: str) -> None:
    method = registry.training(name)
    for changes in ({}, {"depth": 2}) if name == "sortednet" else ({},):
        config = method.Config.model_validate(changes)
        baselines = method.baselines(config)
        assert bool(baselines) != bool(method.not_informative), "baselines, or in not_informative why there are none"
        for table in baselines.values():
            baseline = CompressConfig.model_validate(table).parameters
            assert not getattr(baseline, "baselines", False), "a baseline has no baselines of its own"
            assert getattr(baseline, "steps", 0) in (0, config.steps)


@pytest.mark.parametrize("name", [*registry.names("structure"), *registry.names("kv_cache")])
def test_methods_of_whole_models_do_both_families_or_refuse_by_name(
    name: str, prepare: Artifact, parent: Artifact, tmp_path: Path
) -> None:
    config = CompressConfig.model_validate({"method": name})
    context = StageContext(node="compress.x", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
    inputs = {"prepare": prepare, "model": parent}
    try:
        run(config, inputs, tmp_path, context)
    except ConfigError as error:
        assert name in str(error)  # noqa: PT017 - a refusal is one of the two right answers
        return
    report = json.loads((tmp_path / "compression.json").read_text())
    assert report["totals"]["layers"] == len(report["layers"]) == 2
    assert name not in registry.names("kv_cache") or report["errors"]["baselines"]
    assert report["totals"]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        logits, original = (load_model(f / "model")(input_ids=ids).logits for f in (tmp_path, parent.path))
    assert bool(torch.isfinite(logits).all())
    assert not torch.allclose(logits, original, atol=1e-6), "it does nothing"
    again = tmp_path / "again"
    again.mkdir()
    run(config, inputs, again, context)
    assert (again / "compression.json").read_bytes() == (tmp_path / "compression.json").read_bytes()


@pytest.fixture(scope="module", params=["inf", "nan"])
def not_finite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small decoder with one weight that is not finite."""
    folder = tmp_path_factory.mktemp(request.param) / "build"
    shape = ArchitectureConfig(width=32, layers=2, heads=2, ffn_width=64, vocab_size=64, max_positions=32, **IDS)
    model = build(shape, seed=0)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = float(request.param)
    model.save_pretrained(folder / "model")
    return _publish(folder)


@pytest.mark.parametrize("name", registry.names())
def test_no_method_starts_on_a_weight_that_is_not_finite(
    name: str, prepare: Artifact, not_finite: Artifact, tmp_path: Path
) -> None:
    table = {"method": name}
    context = StageContext(node="compress.x", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 of 2048 values"):
        run(CompressConfig.model_validate(table), {"prepare": prepare, "model": not_finite}, tmp_path, context)
    assert not list(tmp_path.iterdir())


def _publish(folder: Path) -> Artifact:
    return artifact.publish(
        folder, folder.with_name("artifact"), stage="x", node="x", identity={}, parents={}, summary={}
    )
