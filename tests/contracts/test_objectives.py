"""What every objective keeps to, whichever it is: the registry finds it, and this file asks the same of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models.objectives
from models.architectures.build import build
from models.architectures.config import IGNORED, ArchitectureConfig, Family
from models.objectives import registry
from models.objectives.base import Ids, Objective, ObjectiveContext

VOCABULARY = 64
CONTEXT = ObjectiveContext(seed=3, vocab_size=VOCABULARY, bos_id=0, eos_id=1, pad_id=2, mask_id=3)


def make(name: str, seed: int = 3) -> Objective:
    objective = registry.get(name)
    context = ObjectiveContext(**{**vars(CONTEXT), "seed": seed})
    return objective(context, objective.Config())


def tokens(rows: int = 6, length: int = 40) -> Ids:
    """Random text that ends in padding."""
    made = np.random.default_rng(0).integers(4, VOCABULARY, size=(rows, length)).astype(np.int64)
    made[:, -4:] = CONTEXT.pad_id
    return made


def targets_of(objective: Objective, rows: Ids, samples: list[int]) -> tuple[Ids, Ids]:
    return objective.targets(rows, np.array(samples), np.zeros(len(samples), dtype=np.int64))


@pytest.mark.parametrize("name", registry.names())
def test_inputs_and_targets_depend_on_the_sample_alone(name: str) -> None:
    """The same sample gives the same targets in any batch, at any place: what resuming on other ranks needs."""
    rows, objective = tokens(), make(name)
    before = rows.copy()
    inputs, targets = targets_of(objective, rows, [0, 1, 2, 3, 4, 5])
    assert (rows == before).all()
    again = targets_of(make(name), rows[[4, 1]], [4, 1])
    assert (again[0] == inputs[[4, 1]]).all()
    assert (again[1] == targets[[4, 1]]).all()


@pytest.mark.parametrize("name", registry.names())
def test_every_setting_has_a_default_and_a_description(name: str) -> None:
    fields = registry.get(name).Config.model_fields
    assert [key for key, field in fields.items() if field.is_required() or not field.description] == []


@pytest.mark.parametrize("name", registry.names())
def test_padding_is_never_asked_for_and_something_is(name: str) -> None:
    rows = tokens()
    _, targets = targets_of(make(name), rows, list(range(len(rows))))
    assert CONTEXT.pad_id not in targets[targets != IGNORED]
    assert (targets != IGNORED).any(axis=1).all()


@pytest.mark.parametrize("name", registry.names())
@torch.no_grad()
def test_the_loss_is_a_sum_over_targets_however_the_batch_is_cut(name: str) -> None:
    objective = make(name)
    family: Family = sorted(objective.families)[0]
    model = build(
        ArchitectureConfig(
            family=family, width=16, layers=1, heads=2, ffn_width=24, vocab_size=VOCABULARY, max_positions=40,
            bos_id=0, eos_id=1, pad_id=2, mask_id=3,
        ),
        seed=1,
    ).eval()  # fmt: skip
    inputs, targets = (torch.from_numpy(part) for part in targets_of(objective, tokens(), list(range(6))))
    whole = objective.nats(model, inputs, targets)
    parts = sum(objective.nats(model, inputs[half], targets[half]) for half in (slice(0, 2), slice(2, 6)))
    assert whole.dtype == torch.float32
    assert float(whole) > 0
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0.0)
    nothing = objective.nats(model, inputs, torch.full_like(targets, IGNORED))
    assert float(nothing) == 0.0


def test_one_file_is_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backwards_toy.py").write_text(
        "from models.objectives import base\n"
        "class Objective(base.Objective):\n"
        "    families = frozenset({'decoder'})\n"
        "    def targets(self, tokens_BT, samples_B, epochs_B):\n"
        "        return tokens_BT[:, ::-1], tokens_BT\n"
    )
    monkeypatch.setattr(models.objectives, "__path__", [*models.objectives.__path__, str(tmp_path)])
    assert "backwards_toy" in registry.names()
    assert registry.get("backwards_toy").families == {"decoder"}
    with pytest.raises(ValueError, match=r"no pretraining objective 'causl'; did you mean 'causal'.*masked"):
        registry.get("causl")
