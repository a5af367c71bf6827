"""SortedNet: exits are models of their own, draws are pure, and a cut is the model that it claims to be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from models.architectures import predict
from models.architectures.build import build
from models.architectures.config import ArchitectureConfig
from models.compression import sortednet
from models.compression.sortednet import Config
from models.compression.training_method import Step

SIZES: dict[str, Any] = {"width": 16, "layers": 4, "heads": 2, "ffn_width": 24, "vocab_size": 31, "max_positions": 12}
IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}


def model(family: str = "decoder") -> Any:
    table = {"family": family, "init_std": 0.3, **SIZES, **IDS}
    return build(ArchitectureConfig.model_validate(table), seed=0).eval()


def one_step(network: Any) -> Step:
    tokens = torch.randint(4, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    return Step(network, None, tokens, tokens.roll(-1, 1), number=3, seed=5)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("exits", [(4,), (1, 4), ()])
def test_the_loss_is_the_mean_over_the_models_cut_at_each_exit(family: str, exits: tuple[int, ...]) -> None:
    step = one_step(model(family))
    expected = []
    for depth in exits or (1, 2, 3, 4):
        short = model(family)
        sortednet.truncate(short, depth)
        expected.append(float(predict.language_nats(short, step.inputs_BT, step.targets_BT).detach()))
    loss = float(sortednet.Method().loss(step, Config(exits=exits)).detach())
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("drawn", [0, 1])
def test_no_layer_is_ever_without_a_gradient(drawn: int) -> None:
    network = model()
    sortednet.Method().loss(one_step(network), Config(drawn=drawn)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_drawn_depths_are_pure_ascending_and_end_with_the_deepest() -> None:
    config, seen = Config(drawn=2), Counter[int]()
    for step in range(400):
        chosen = sortednet.exits(config, 6, seed=1, step=step)
        assert chosen == sortednet.exits(config, 6, seed=1, step=step)
        assert len(chosen) == 3
        assert list(chosen) == sorted(set(chosen))
        assert chosen[-1] == 6
        seen.update(chosen[:-1])
    # 400 draws of 2 of 5: each depth 160 times, standard deviation below 10.
    assert all(120 < seen[depth] < 200 for depth in range(1, 6))
    assert [sortednet.exits(config, 6, seed=1, step=n) for n in range(9)] != [
        sortednet.exits(config, 6, seed=2, step=n) for n in range(9)
    ]


def test_without_draws_every_chosen_depth_counts() -> None:
    assert sortednet.exits(Config(), 3, seed=0, step=0) == (1, 2, 3)
    assert sortednet.exits(Config(exits=(3, 1)), 4, seed=0, step=0) == (1, 3)
    assert sortednet.exits(Config(exits=(1, 3), drawn=5), 4, seed=0, step=0) == (1, 3)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_cut_keeps_the_first_layers_and_says_so_in_its_configuration(family: str) -> None:
    network, whole = model(family), model(family)
    assert sortednet.Method().finish(network, Config(depth=2)) == {}
    assert network.config.num_hidden_layers == len(predict.stack(network)) == 2
    if family == "encoder":
        assert len(network.config.layer_types) == 2
    tokens = one_step(whole).inputs_BT
    outputs, _ = predict.layer_outputs(whole, tokens)
    normal = predict.final_norm(whole)(outputs[1])
    torch.testing.assert_close(predict.hidden_states(network, tokens), normal, rtol=1e-6, atol=1e-6)


def test_training_one_depth_alone_leaves_the_layers_above_out() -> None:
    network = model()
    sortednet.Method().transform(network, [], Config(exits=(2,)))
    assert len(predict.stack(network)) == 2


@pytest.mark.parametrize("table", [{"depth": 5}, {"exits": (1, 9)}])
def test_a_depth_beyond_the_model_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"depth \d, but the model has 4 layers; valid: 1 to 4"):
        sortednet.Method().transform(model(), [], Config.model_validate(table))


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a model has at least 1 layer"):
        sortednet.Method().transform(model(), [], Config(exits=(0, 2)))


def test_the_arms_are_a_plain_cut_and_the_depth_trained_alone() -> None:
    arms = sortednet.Method().baselines(Config(depth=2, steps=30))
    assert arms["cut"]["steps"] == 0
    assert arms["trained alone"]["exits"] == (2,)
    assert arms["trained alone"]["steps"] == 30
    assert sortednet.Method().baselines(Config(depth=2, steps=0)) == {}
