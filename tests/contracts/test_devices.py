"""No method mixes devices: each works where its arguments are, and computes there what it computes on the CPU.

There is no second device here, so a fake one takes its place (see `tests.fake_device`). The defaults of weight methods
are driven in `test_compression`; here are their other ways, and methods of all other kinds. A new method is driven too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import registry
from models.compression.base import Packed, Statistics
from models.compression.formats.cache_codes import rounding
from models.compression.modules import packed_linear
from models.compression.modules.quantized_cache import Tables, attach
from models.compression.solvers.structured import Structure
from models.compression.training_method import Step
from tests.fake_device import DEVICE, FakeDevice, host

TABLES: dict[str, list[dict[str, Any]]] = {
    "awq": [{"input_scales": False}],
    "bitnet": [{"norm": True, "scale": "median"}],
    "distill": [{"features": 1.0}],
    "fp8": [{"form": "e5m2"}],
    "gpfq": [{"rounding": "stochastic"}, {"threshold": "hard", "level": 0.6}],
    "gptq": [{"order": "natural", "keep_zeros": True}, {"symmetric": False}],
    "hawq": [{"sensitivity": "gradients"}, {"sensitivity": "hessian", "rounding": "nearest"}],
    "int8": [{"calibrator": "p99.9"}, {"calibrator": "entropy"}, {"rescale": "dyadic"}],
    "kvquant": [{"keys": "token"}, {"bits": 2}, {"codebook": "uniform"}, {"outliers": 0.0}],
    "lq_lora": [{"weighting": "hessian"}, {"weighting": "none", "budget": 4.0}],
    "lq_lora_tune": [{"init_from": "zero"}],
    "maestro": [{"cut": "start"}, {"penalty": 0.1, "drawn": "one"}],
    "paretoq": [{"bits": 1.0}, {"bits": 1.58, "storage": "ternary5"}, {"storage": "public"}],
    "pb_llm": [{"salience": "hessian", "group_size": 32}],
    "rtn": [{"symmetric": False, "group_size": 32}, {"activations": "int8"}],
    "sortednet": [{"depth": 1}],
    "sparsegpt": [{"storage": "bitmask"}, {"pattern": "2:4"}],
    "svd": [{"metric": "diagonal"}],
    "wanda": [{"storage": "bitmask", "value_bits": 16}],
}
"""What is driven besides the defaults, where that takes other ways through a method."""


def cases(kind: Any) -> list[Any]:
    """Return (name, parameters) of every method of a kind."""
    pairs = [(name, table) for name in registry.names(kind) for table in [{}, *TABLES.get(name, [])]]
    return [pytest.param(*pair, id=f"{pair[0]}-{'-'.join(map(str, pair[1].values()))}".strip("-")) for pair in pairs]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Statistics]:
    """A weight [24, 64] and all statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(64) + torch.randn(64, 64, generator=generator) / 8
    inputs = torch.randn(300, 64, generator=generator) @ mixing
    weight, fisher = torch.randn(24, 64, generator=generator), torch.rand(24, 64, generator=generator)
    moment = inputs.double().T @ inputs.double()
    return weight, Statistics(moment, 300, inputs_NI=inputs, reference_NI=inputs, fisher_OI=fisher)


def moved(statistics: Statistics) -> Statistics:
    """Return the statistics on the device."""
    there = {key: v.to(DEVICE) if isinstance(v, Tensor) else v for key, v in vars(statistics).items()}
    return Statistics(**there)


def same(there: Packed, plain: Packed) -> None:
    """Assert that a packed weight stands on the device for what one on the CPU stands for."""
    assert there.dequantize().device == DEVICE
    assert torch.equal(host(there.dequantize()), plain.dequantize())
    assert there.stored_bits() == plain.stored_bits()


@pytest.mark.parametrize(("name", "table"), [case for case in cases("weight") if case.values[1]])
def test_every_way_through_a_weight_method_stays_where_the_weight_is(
    name: str, table: dict[str, Any], layer: Any
) -> None:
    weight, seen = layer
    method = registry.weight(name)
    config = method.Config.model_validate(table)
    plain, baselines = method.compress(weight, seen, config), method.baselines(weight, seen, config)
    with FakeDevice():
        there = weight.to(DEVICE), moved(seen), config
        same(method.compress(*there), plain)
        for label, baseline in method.baselines(*there).items():
            same(baseline, baselines[label])
        same(method.restore({key: tensor.to(DEVICE) for key, tensor in plain.tensors().items()}, config), plain)


@pytest.mark.parametrize(("name", "table"), cases("weight"))
def test_a_layer_read_from_disk_computes_where_its_model_is(name: str, table: dict[str, Any], layer: Any) -> None:
    """What was read stays on the CPU; the model goes to the device before or after it takes the layer."""
    weight, seen = layer
    method = registry.weight(name)
    config = method.Config.model_validate(table)
    packed = method.restore(method.compress(weight, seen, config).tensors(), config)
    model, x = nn.Sequential(nn.Linear(64, 24)), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    packed_linear.put(model, "0", packed)
    plain = model(x)
    with FakeDevice():
        late = nn.Sequential(nn.Linear(64, 24)).to(DEVICE)
        packed_linear.put(late, "0", packed)
        assert late(x.to(DEVICE)).device == DEVICE
        result = model.to(DEVICE)(x.to(DEVICE))
    assert torch.equal(host(result), plain)


@pytest.mark.parametrize(("name", "table"), cases("weight"))
def test_costs_are_predicted_where_the_weight_is(name: str, table: dict[str, Any], layer: Any) -> None:
    weight, seen = layer
    method = registry.weight(name)
    allocation = method.allocation(method.Config.model_validate(table))
    for option in allocation.options[:: max(1, len(allocation.options) // 4)] if allocation else ():
        expected = method.cost(weight, seen, option)
        with FakeDevice():
            assert method.cost(weight.to(DEVICE), moved(seen), option) == expected


def model_of(family: str) -> nn.Module:
    """Return a small model."""
    sizes = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 64, "vocab_size": 64, "max_positions": 32}
    ids = {"bos_id": 60, "eos_id": 61, "pad_id": 62, "mask_id": 63}
    return build(ArchitectureConfig.model_validate({"family": family} | sizes | ids), seed=0)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize(("name", "table"), cases("training"))
def test_a_student_trains_and_is_packed_where_it_is(name: str, table: dict[str, Any], family: str) -> None:
    """The student is put together on the CPU and moved, as a worker does, or put together where it is."""
    method = registry.training(name)
    config = method.Config.model_validate(table)
    ids = torch.arange(32).view(1, 32) % 60

    def student(device: torch.device) -> nn.Module:
        model = model_of(family).to(device)
        method.transform(
            model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n], config
        )
        return model

    def packed(model: nn.Module, device: torch.device) -> dict[str, Packed]:
        teacher = model_of(family).to(device) if config.needs_teacher else None
        method.loss(Step(model, teacher, ids.to(device), ids.to(device), number=0, seed=0), config).backward()
        with torch.no_grad():
            return method.finish(model, config)

    cpu = torch.device("cpu")
    plain = packed(student(cpu), cpu)
    with FakeDevice():
        for model in (student(cpu).to(DEVICE), student(DEVICE)):
            assert {parameter.device for parameter in model.parameters()} == {DEVICE}
            there = packed(model, DEVICE)
            assert there.keys() == plain.keys()
            for name_of_layer, one in there.items():
                same(one, plain[name_of_layer])


@pytest.mark.parametrize(("name", "table"), cases("kv_cache"))
def test_a_cache_is_fitted_and_kept_where_the_states_are(name: str, table: dict[str, Any]) -> None:
    method = registry.kv_cache(name)
    config = method.Config.model_validate(table)
    generator = torch.Generator().manual_seed(0)
    x, fisher = torch.randn(200, 32, generator=generator), torch.rand(200, 32, generator=generator)
    with FakeDevice():
        for each in (config, *(baseline.config for baseline in method.baselines(config).values())):
            for fit in (method.fit_keys, method.fit_values):
                there, plain = fit(x.to(DEVICE), fisher.to(DEVICE), each), fit(x, fisher, each)
                rows, expected = there.encode(x.to(DEVICE)), plain.encode(x)
                assert torch.equal(host(there.decode(rows)), plain.decode(expected))
                assert torch.equal(host(rows.take(torch.arange(5, device=DEVICE)).codes_NB), expected.codes_NB[:5])


@pytest.mark.parametrize("exact", [0, 2])
def test_a_model_with_a_quantized_cache_runs_where_it_was_moved(exact: int) -> None:
    """Its tables were read on the CPU."""
    table, ids = Tables(rounding(3, 8), rounding(3, 8), exact), torch.arange(20).view(1, 20)
    model: Any = attach(model_of("decoder"), [table] * 2)  # type: ignore[arg-type]
    with torch.no_grad(), FakeDevice():
        plain = model(input_ids=ids, use_cache=True).logits
        output = model.to(DEVICE)(input_ids=ids.to(DEVICE), use_cache=True)
        assert torch.allclose(host(output.logits), plain, atol=1e-5)
        cache = output.past_key_values
        cache.crop(-4)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
        cache.batch_select_indices(torch.tensor([0], device=DEVICE))
        after = model(input_ids=ids[:, 16:17].to(DEVICE), past_key_values=cache, use_cache=True)
        assert after.logits.device == DEVICE


class _Masked:
    """A masked model on the device without a model: losses and features follow from the masks."""

    layers, groups, neurons = 2, 2, 16

    def loss(self, structure: Structure) -> float:
        return float(structure.neurons_LF.double().flatten() @ torch.arange(32.0, dtype=torch.float64))

    def trajectory(self, layer: int, kind: str, removed: Tensor) -> tuple[list[Tensor], Tensor]:
        features, logits = self.original(layer)
        return [x + float(removed.sum()) + kind.count("n") for x in features], logits

    def original(self, layer: int) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(layer)
        return [torch.randn(8, 4, generator=generator).to(DEVICE)], torch.randn(8, 5, generator=generator).to(DEVICE)

    def magnitudes(self) -> dict[str, Tensor]:
        return {"groups": torch.arange(4.0).view(2, 2).to(DEVICE), "neurons": torch.arange(32.0).view(2, 16).to(DEVICE)}


@pytest.mark.parametrize("name", registry.names("structure"))
def test_a_structure_is_selected_on_the_device_and_its_masks_are_on_the_cpu(name: str) -> None:
    method = registry.structure(name)
    config = method.Config.model_validate({"heads": 0.5, "neurons": 0.25})
    with FakeDevice():
        model = _Masked()
        for structure in [method.select(model, config), *method.baselines(model, config).values()]:
            assert structure.neurons_LF.device.type == structure.groups_LG.device.type == "cpu"
            assert structure.neurons_LF.sum(1).tolist() == [12, 12]
