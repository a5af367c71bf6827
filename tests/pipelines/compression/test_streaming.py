"""A model that is scored block by block gives the numbers of the whole model, to the last bit, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.architectures.config import Family
from models.compression import registry
from models.compression.modules import packed_linear
from pipelines.compression import layer_selection, sequential, streaming
from pipelines.compression.config import CompressConfig
from pipelines.compression.quick_eval import QuickEval
from pipelines.compression.run import CompressionRun
from pipelines.compression.sequential import Assignment
from pipelines.compression.stage import run as compress_stage
from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import StageContext
from pipelines.measure import windows
from pipelines.modelio.load import load_model, load_weights
from pipelines.registry.fetch import copy_dense
from tests.pipelines import families
from tests.pipelines.compression.conftest import publish, write_prepare

CPU = torch.device("cpu")
LENGTH = 32


def text_of(family: Family) -> QuickEval:
    """Three documents of unequal length, in two batches."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(5, families.VOCABULARY, (n,), generator=generator).numpy() for n in (30, 21, 9)]
    if family == "decoder":
        cuts = [w for number, ids in enumerate(tokens) for w in windows.causal_windows(len(ids), number, 16, 12)]
        batches = windows.causal_batches(tokens, cuts, 48)
    else:
        masked = [windows.mask(str(number), len(ids), 0.3, 0) for number, ids in enumerate(tokens)]
        cuts = [w for number, hidden in enumerate(masked) for w in windows.masked_windows(number, 16, hidden)]
        batches = windows.masked_batches(tokens, cuts, 48, 4)
    assert len(batches) > 1
    return QuickEval(batches, len(tokens), family, CPU)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokens = torch.randint(5, families.VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    ids = {"bos_id": 1, "eos_id": 2, "pad_id": 3, "mask_id": 4}
    return write_prepare(tmp_path_factory.mktemp("prepare") / "data", tokens, ids, families.VOCABULARY)


def opened_family(name: str, prepare: Any, folder: Path, table: dict[str, Any]) -> CompressionRun:
    families.build(name).save_pretrained(folder / "saved")
    copy_dense(folder / "saved", folder / "base" / "model")
    context = StageContext("compress.x", folder / "scratch", compute=ComputeConfig(device="cpu"))
    config = CompressConfig.model_validate({"samples": 8, "baseline_documents": 0, **table})
    inputs = {"prepare": prepare, "model": publish(folder / "base", "fetch")}
    return CompressionRun.open(config, inputs, folder / "out", context, compress_stage)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_base_and_its_variant_score_block_by_block_as_they_do_whole(name: str, prepare: Any, tmp_path: Path) -> None:
    run = opened_family(name, prepare, tmp_path, {"method": "rtn", "bits": 4, "group_size": 16})
    text = text_of(run.family)
    assert np.array_equal(streaming.base_nats(run, text, "base"), text.nats(load_weights(run.source), "base"))
    assert all(parameter.is_meta for parameter in sequential.meta_init.blocks(run.base)[1].parameters())
    compress_stage(run.config, run.inputs, run.out_dir, run.context)
    streamed, whole = (
        streaming.stored_nats(run, text, "variant", run.target),
        text.nats(load_model(run.target), "variant"),
    )
    assert np.allclose(streamed, whole, rtol=1e-6)
    assert not np.allclose(streamed, streaming.base_nats(run, text, "base"), rtol=1e-4)


@pytest.mark.parametrize("table", [{"method": "gptq", "bits": 3}, {"method": "int8"}])
def test_what_is_scored_while_it_is_compressed_is_what_would_be_stored(
    table: dict[str, Any], small: Callable[..., Any], opened: Any
) -> None:
    """Inputs that are rounded too; and the base is as it was afterwards."""
    run = opened(small(), {"samples": 8, **table})
    text = text_of("decoder")
    method = registry.weight(str(table["method"]))
    assignment = Assignment(method, run.config.parameters, sequential.targets(run.base, ()))
    nats_D, bits = streaming.compressed_nats(run, text, "variant", assignment)
    shelf = layer_selection.Shelf.filled(run, assignment)
    assert bits == sum(shelf[name].stored_bits() for name in shelf)
    model = run.load_base()
    for name, packed in shelf.items():
        packed_linear.put(model, name, packed)
    assert np.array_equal(nats_D, text.nats(model, "variant"))
    assert np.array_equal(nats_D, streaming.base_nats(run, text, "variant", shelf))
    assert np.array_equal(streaming.base_nats(run, text, "base"), text.nats(run.load_base(), "base"))
