"""Models without weights: nothing is allocated, what is loaded is what transformers loads, and it can be let go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose output matrix is its embedding."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=31, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return folder


def test_nothing_but_buffers_is_allocated(model_folder: Path) -> None:
    model = meta_init.build(model_folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    for (name, buffer), (other_name, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert name == other_name
        assert torch.equal(buffer, other)


def test_parameters_are_real_again_outside_of_the_block() -> None:
    with meta_init.parameters_on_meta():
        assert nn.Linear(2, 2).weight.device.type == "meta"
    assert nn.Linear(2, 2).weight.device.type == "cpu"

    def fail() -> None:
        with meta_init.parameters_on_meta():
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_model_loaded_piece_by_piece_computes_what_transformers_computes(model_folder: Path) -> None:
    model, reader = meta_init.build(model_folder), WeightReader(model_folder)
    name, layers = meta_init.blocks(model)
    assert (name, len(layers)) == ("model.layers", 2)
    meta_init.load_rest(model, name, reader, CPU)
    assert {parameter.device.type for parameter in layers.parameters()} == {"meta"}
    for number, layer in enumerate(layers):
        meta_init.load(layer, f"{name}.{number}", reader, CPU, torch.float32)
    model.tie_weights()
    plain = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    meta_init.release(layers[0])
    assert {parameter.device.type for parameter in layers[0].parameters()} == {"meta"}
    assert {parameter.device.type for parameter in layers[1].parameters()} == {"cpu"}


def test_an_architecture_that_transformers_lacks_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    for names in (["NobodysModel"], None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": names}))
        with pytest.raises(IntegrityError, match=r"config\.json names the architecture '(NobodysModel|\(none\))'"):
            meta_init.build(tmp_path)


def test_a_model_with_two_stacks_of_its_depth_is_refused(model_folder: Path) -> None:
    model = meta_init.build(model_folder)
    model.other = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(ConfigError, match="has 2 stacks of 2 layers; compression walks models with one"):
        meta_init.blocks(model)
