"""Masked tokens: which, how many, as what, and a function of seed, sample and epoch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.objectives.base import IGNORED, ObjectiveContext
from models.objectives.masked import MaskingConfig, Objective, mask_tokens

SPECIAL = (0, 1, 2, 3)
RULE = MaskingConfig()


def mask(tokens: list[int], **changes: Any) -> tuple[list[int], list[int]]:
    values = {"seed": 1, "sample": 2, "epoch": 0, "rule": RULE, "vocab_size": 500, "special": SPECIAL}
    inputs, targets = mask_tokens(np.array(tokens), **{**values, **changes})
    return inputs.tolist(), targets.tolist()


def test_masked_tokens_are_a_function_of_seed_sample_and_epoch() -> None:
    tokens = list(range(4, 104))
    first = mask(tokens)
    assert mask(tokens) == first
    assert all(mask(tokens, **{key: 9}) != first for key in ("seed", "sample", "epoch"))


def test_a_prefix_is_masked_alike_whatever_its_neighbours_are() -> None:
    same = mask([5] * 60, vocab_size=500)[1]
    other = mask([7] * 60, vocab_size=500)[1]
    assert [t == IGNORED for t in same] == [t == IGNORED for t in other]


def test_special_tokens_are_never_targets() -> None:
    tokens = [0, 1, 2, 3] * 50
    inputs, targets = mask(tokens)
    assert inputs == tokens
    assert set(targets) == {IGNORED}


def test_the_shares_of_masking_are_those_of_the_rule() -> None:
    rule = MaskingConfig(probability=0.25, mask=0.6, random=0.3)
    tokens = [7] * 40_000
    inputs, targets = mask(tokens, rule=rule, vocab_size=5000)
    labelled = [s for s, t in zip(inputs, targets, strict=True) if t != IGNORED]
    assert len(labelled) / len(tokens) == pytest.approx(0.25, abs=0.01)
    assert labelled.count(3) / len(labelled) == pytest.approx(0.6, abs=0.02)
    assert labelled.count(7) / len(labelled) == pytest.approx(0.1, abs=0.02)
    assert len(set(labelled)) > 1000
    assert all(s == 7 for s, t in zip(inputs, targets, strict=True) if t == IGNORED)


def test_all_targets_can_be_masked() -> None:
    inputs, targets = mask([9] * 200, rule=MaskingConfig(mask=1.0, random=0.0))
    assert {s for s, t in zip(inputs, targets, strict=True) if t != IGNORED} == {3}


def test_no_special_token_is_shown_for_another_one() -> None:
    """A start token amid a document would cut it in two (`models.architectures.documents`)."""
    inputs, targets = mask([9] * 2000, rule=MaskingConfig(mask=0.0, random=1.0), vocab_size=12)
    shown = [token for token, target in zip(inputs, targets, strict=True) if target != IGNORED]
    assert set(shown) == set(range(4, 12))


def test_a_masked_batch_hides_each_sequence_by_its_own_stream() -> None:
    objective = Objective(ObjectiveContext(1, 500, *SPECIAL), RULE)
    tokens = np.full((2, 50), 9)
    all_inputs, all_targets = objective.targets(tokens, np.array([2, 8]), np.array([0, 5]))
    for row, (sample, epoch) in enumerate([(2, 0), (8, 5)]):
        inputs, targets = mask([9] * 50, sample=sample, epoch=epoch)
        assert all_inputs[row].tolist() == inputs
        assert all_targets[row].tolist() == targets


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"mask \+ random = 1\.1; together they may be at most 1"):
        MaskingConfig(mask=0.9, random=0.2)
