"""Every family that follows transformers' conventions is compressed by the same walk; none is known by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from pipelines.compression.config import CompressConfig
from pipelines.compression.stage import run
from pipelines.core.artifact import Artifact
from pipelines.core.stage import StageContext
from pipelines.modelio.load import load_model
from pipelines.registry.fetch import copy_dense
from tests.pipelines import families
from tests.pipelines.compression.conftest import publish, write_prepare

LENGTH = 32
SCALED = {"method": "awq", "bits": 4, "group_size": 16}
"""In our own layout, which holds everything beside the layers too: a head of GPT-NeoX was once lost there."""
METHODS = ({"method": "rtn", "bits": 8, "group_size": 16}, {"method": "gptq", "bits": 4, "group_size": 16})


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(5, families.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("prepare") / "data"
    ids = {"bos_id": 1, "eos_id": 2, "pad_id": 3, "mask_id": 4}
    return write_prepare(folder, tokens(8, seed=1), ids, families.VOCABULARY)


def divergence(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Return the mean KL divergence of `other` from `one`, in nats a token."""
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens(2, seed=2)).logits.float().log_softmax(-1) for m in (one, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_compressed_and_loads(family: str, prepare: Artifact, tmp_path: Path) -> None:
    base = families.build(family)
    base.save_pretrained(tmp_path / "saved")
    copy_dense(tmp_path / "saved", tmp_path / "base" / "model")  # as `fetch` brings it
    parent = publish(tmp_path / "base", "fetch")
    lost = []
    for table in (*METHODS, SCALED) if family in {"gpt-neox", "gpt2", "llama"} else METHODS:
        out = tmp_path / str(table["method"])
        context = StageContext("compress.x", tmp_path / "scratch", store=tmp_path)
        config = CompressConfig.model_validate({**table, "samples": 8, "baseline_documents": 0})
        run(config, {"prepare": prepare, "model": parent}, out, context)
        variant = load_model(out / "model")
        lost.append(divergence(base, variant))
        if (out / "model" / "model.safetensors").exists():  # what others load computes the same
            kind = AutoConfig.from_pretrained(out / "model").architectures[0]
            plain = getattr(transformers, kind).from_pretrained(out / "model").eval()
            assert divergence(variant, plain) < 1e-6
    assert lost[0] < 0.01  # 8 bits lose next to nothing; a wrong layer would lose nats
    assert max(lost[1:]) < 0.5
