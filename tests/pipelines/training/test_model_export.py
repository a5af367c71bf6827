"""Exported weights: put together bit for bit from fragments on real ranks, and written so that others load them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.optim.fragment_layout import Fragment, Layout
from models.optim.lamb import Lamb
from pipelines.core.errors import IntegrityError, NumericError
from pipelines.core.launcher import launch
from pipelines.training.distributed import Ranks
from pipelines.training.model_export import copy_tokenizer, gather_weights, write_json, write_model

ALONE = Ranks(0, 1, torch.device("cpu"))
AWKWARD = [0.0, -0.0, 1e-45, -1.5, float("inf"), 3.0e38, float("nan")]


def architecture(family: str) -> ArchitectureConfig:
    return ArchitectureConfig.model_validate(
        {"family": family, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "vocab_size": 31}
        | {"max_positions": 12, "bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}
    )


def test_a_single_process_gives_its_parameters_under_the_names_of_the_model() -> None:
    weight = torch.nn.Parameter(torch.tensor(AWKWARD))
    weights = gather_weights(Lamb([("model.norm.weight", weight)]), ALONE)
    assert list(weights) == ["norm.weight"]
    assert torch.equal(weights["norm.weight"].view(torch.int32), weight.detach().view(torch.int32))


def test_a_part_that_nobody_holds_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(6))
    optimizer = Lamb([("model.norm.weight", weight)])
    part = Fragment("model.norm.weight", (6,), 0, 4, weight)
    optimizer.bind(Layout((part,), {"model.norm.weight": (6,)}, {"model.norm.weight": weight}))
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight: the ranks hold 4 of 6 elements"):
        gather_weights(optimizer, ALONE)


@pytest.mark.slow
def test_fragments_of_three_ranks_come_together_bit_for_bit(tmp_path: Path) -> None:
    script = Path(__file__).with_name("export_worker.py")
    environment = {"OMP_NUM_THREADS": "1"}
    launch([sys.executable, str(script), str(tmp_path)], world_size=3, log_dir=tmp_path / "logs", env=environment)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["gathered"] == result["expected"]
    assert result["others"] == [0, 0]


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_same_weights_give_the_same_files(family: str, tmp_path: Path) -> None:
    config = architecture(family)
    weights = dict(build(config, seed=0).named_parameters())
    for name in ("a", "b"):
        write_model(tmp_path / name, config, {k: v.detach() for k, v in weights.items()}, "fp32")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert ("generation_config.json" in names) == (family == "decoder")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in stored)


def test_a_bf16_run_is_stored_in_bf16_and_says_so(tmp_path: Path) -> None:
    config = architecture("decoder")
    write_model(tmp_path / "m", config, {k: v.detach() for k, v in build(config, seed=0).named_parameters()}, "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_an_older_attempt_left_is_replaced(tmp_path: Path) -> None:
    config = architecture("decoder")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "stale.txt").write_text("old")
    write_model(tmp_path / "m", config, {k: v.detach() for k, v in build(config, seed=0).named_parameters()}, "fp32")
    assert not (tmp_path / "m" / "stale.txt").exists()


def test_a_weight_that_is_not_finite_as_stored_is_not_written(tmp_path: Path) -> None:
    config = architecture("decoder")
    weights = {k: v.detach().clone() for k, v in build(config, seed=0).named_parameters()}
    weights["model.norm.weight"][1] = 3.4e38  # finite in float32, not in bfloat16
    with pytest.raises(NumericError, match=r"the weight model\.norm\.weight has 1 of"):
        write_model(tmp_path / "m", config, weights, "bf16")
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="the prepare artifact holds no tokenizer"):
        copy_tokenizer(tmp_path, tmp_path)


def test_floats_keep_every_digit(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": 1 / 3})
    assert json.loads((tmp_path / "x.json").read_text())["loss"].hex() == (1 / 3).hex()
