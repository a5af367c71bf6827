"""Documents of a packed sequence are apart: another neighbour moves nothing, and alone they mean the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.architectures import documents, predict
from models.architectures.build import build
from models.architectures.config import ArchitectureConfig

BOS, PAD, LENGTH = 0, 2, 40


def model_of(family: str) -> nn.Module:
    config = ArchitectureConfig.model_validate(
        {"family": family, "width": 32, "layers": 4, "heads": 2, "ffn_width": 48, "vocab_size": 64, "local_window": 8}
        | {"max_positions": LENGTH, "bos_id": BOS, "eos_id": 1, "pad_id": PAD, "mask_id": 3}
    )
    return build(config, seed=0)


def logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return predict.logits(model, predict.hidden_states(model, tokens_BT))


def packed() -> Tensor:
    """Two documents, padding, the rest of a third one, padding."""
    tokens_BT = torch.randint(4, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens_BT[:, [0, 15]] = BOS
    tokens_BT[:, 25] = PAD
    tokens_BT[:, 36:] = PAD
    return tokens_BT


PARTS = {"first": slice(0, 15), "second": slice(15, 25), "rest": slice(26, 36)}


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("replaced", PARTS)
def test_another_neighbour_moves_no_logit_by_a_bit(family: str, replaced: str) -> None:
    model = model_of(family)
    documents.keep_apart(model, bos_id=BOS, pad_id=PAD)
    one_BT = packed()
    other_BT = one_BT.clone()
    part = PARTS[replaced]
    other_BT[:, part.start + (replaced != "rest") : part.stop] = 63
    before, after = logits(model, one_BT), logits(model, other_BT)
    assert not torch.equal(before[:, part], after[:, part])
    for name, kept in PARTS.items():
        if name != replaced:
            assert torch.equal(before[:, kept], after[:, kept]), name


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_in_company_a_document_means_what_it_means_alone(family: str) -> None:
    model, tokens_BT = model_of(family), packed()
    alone = {name: logits(model, tokens_BT[:, part]) for name, part in PARTS.items()}
    together_before = logits(model, tokens_BT)
    handle = documents.keep_apart(model, bos_id=BOS, pad_id=PAD)
    together = logits(model, tokens_BT)
    for name, part in PARTS.items():
        torch.testing.assert_close(together[:, part], alone[name], rtol=0, atol=2e-6)
    assert (together_before[:, PARTS["second"]] - alone["second"]).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(logits(model, tokens_BT), together_before)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_single_document_is_read_as_ever(family: str) -> None:
    model = model_of(family)
    tokens_BT = torch.randint(4, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    before = logits(model, tokens_BT)
    documents.keep_apart(model, bos_id=BOS, pad_id=PAD)
    assert torch.equal(logits(model, tokens_BT), before)


def test_a_pass_with_a_cache_or_a_mask_is_left_alone() -> None:
    model, tokens_BT = model_of("decoder"), packed()
    expected = predict.greedy(model, tokens_BT[:, :20], 5)
    documents.keep_apart(model, bos_id=BOS, pad_id=PAD)
    assert torch.equal(predict.greedy(model, tokens_BT[:, :20], 5), expected)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_parts_begin_at_the_start_at_start_tokens_and_where_padding_begins_or_ends(tokens: list[int]) -> None:
    found = documents.starts(np.array([tokens]), bos_id=BOS, pad_id=PAD)[0].tolist()
    assert found == [
        place == 0 or token == BOS or (token == PAD) != (tokens[place - 1] == PAD) for place, token in enumerate(tokens)
    ]
    starts_BT = documents.starts(torch.tensor([tokens]), bos_id=BOS, pad_id=PAD)
    assert starts_BT[0].tolist() == found
    count, expected = -1, []
    for begins in found:
        count = 0 if begins else count + 1
        expected.append(count)
    assert documents.positions(starts_BT)[0].tolist() == expected
