"""Children of children: every layout can be a parent, or is refused by name with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

FIRST: list[dict[str, Any]] = [
    {"method": "magnitude", "value_bits": 32, "storage": "bitmask"},
    {"method": "svd"},
    {"method": "optin"},
    {"method": "rtn", "bits": 6, "embeddings": "quantize"},
    {"method": "rtn", "bits": 4, "group_size": 8, "symmetric": False},
]


def published(folder: Path) -> Artifact:
    """Make an artifact of a child."""
    final = folder.with_name(f"{folder.name}-published")
    return artifact.publish(folder, final, stage="compress", node="c", identity={}, parents={}, summary={})


@pytest.mark.parametrize("table", FIRST, ids=[table["method"] + str(n) for n, table in enumerate(FIRST)])
def test_a_child_of_any_layout_can_be_quantized(
    table: dict[str, Any], small: Any, compress: Callable[..., Any]
) -> None:
    """At eight bits the grandchild computes nearly what its parent does, which is far from what the parent's does."""
    bench = small()
    first, _ = compress(bench, table)
    parent = published(first)
    second, report = compress(bench, {"method": "gptq", "bits": 8, "group_size": 0, "samples": 8}, parent=parent)
    assert report["loads_with"] == "transformers"
    with torch.no_grad():
        logits = [
            load_model(path / "model")(input_ids=bench.held_BT).logits
            for path in (bench.parent.path, parent.path, second)
        ]
    far, near = (float((one - logits[1]).square().mean()) for one in (logits[0], logits[2]))
    assert near < 0.1 * far


@pytest.mark.parametrize("first", [{"method": "int8"}, {"method": "quik"}, {"method": "rtn", "activations": "int8"}])
def test_a_parent_that_rounds_its_inputs_is_refused(
    first: dict[str, Any], small: Any, compress: Callable[..., Any]
) -> None:
    bench = small()
    parent = published(compress(bench, first | {"samples": 8})[0])
    with pytest.raises(ConfigError, match=r"gptq cannot start from this base: model\.layers\.0\.\S+ rounds") as found:
        compress(bench, {"method": "gptq"}, parent=parent)
    assert "quantize inputs last" in str(found.value.hint)


def test_inputs_are_rounded_after_pruning_and_the_zeros_stay(small: Any, compress: Callable[..., Any]) -> None:
    bench = small()
    pruned, _ = compress(bench, {"method": "magnitude", "value_bits": 32, "storage": "bitmask"})
    parent = published(pruned)
    out, _ = compress(bench, {"method": "int8", "samples": 8}, parent=parent)
    name = "model.layers.1.mlp.up_proj.weight"
    zeros = [WeightReader(path / "model").dense(name) == 0 for path in (parent.path, out)]
    assert float(zeros[0].float().mean()) == pytest.approx(0.5, abs=0.01)
    assert bool(zeros[1][zeros[0]].all())
