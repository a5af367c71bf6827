"""Distillation's losses against their written sums, and the student's shape and start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.architectures import predict
from models.architectures.build import build
from models.architectures.config import IGNORED, ArchitectureConfig, Shape
from models.compression import distill
from models.compression.distill import Config
from models.compression.training_method import Step

SIZES: dict[str, Any] = {"width": 16, "heads": 2, "ffn_width": 24, "vocab_size": 31, "max_positions": 12}
IDS = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "mask_id": 3}


def model(layers: int, seed: int, **changes: Any) -> Any:
    sizes = {"layers": layers, "init_std": 0.3, **SIZES, **IDS, **changes}
    return build(ArchitectureConfig.model_validate(sizes), seed=seed)


@pytest.fixture
def step() -> Step:
    tokens = torch.randint(4, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORED
    return Step(model(2, seed=0), model(4, seed=1), tokens, targets, number=0, seed=0)


def asked_logits(network: Any, step: Step) -> Tensor:
    with torch.no_grad():
        return network(input_ids=step.inputs_BT).logits[step.targets_BT != IGNORED]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_nats_are_the_divergence_of_the_softened_distributions(temperature: float) -> None:
    teacher, student = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * float((p * (p.log() - q.log())).sum())
    assert float(distill.soft_nats(teacher, student, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distill.soft_nats(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_of_soft_nats_is_the_scaled_difference_of_the_distributions() -> None:
    teacher, student = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    distill.soft_nats(teacher, student, 3.0).backward()
    expected = 3.0 * ((student.detach() / 3).softmax(-1) - (teacher / 3).softmax(-1))
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


def test_features_of_equal_width_are_compared_by_direction_only() -> None:
    one, other = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(distill.feature_distance(one, 5 * one)) == pytest.approx(0.0, abs=1e-6)
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1)
    assert float(distill.feature_distance(one, other)) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)


def test_features_of_other_width_are_compared_by_the_angles_between_tokens() -> None:
    wide = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    padded = torch.nn.functional.pad(wide @ rotation, (0, 4))
    assert float(distill.feature_distance(padded, wide)) == pytest.approx(0.0, abs=1e-6)
    assert float(distill.feature_distance(wide[..., :8], wide)) > 1e-3


@pytest.mark.parametrize(("soft", "features"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.3, 2.0), (0.0, 1.0)])
def test_the_loss_is_the_weighted_sum_of_its_three_parts(soft: float, features: float, step: Step) -> None:
    config = Config(soft=soft, features=features, temperature=2.0)
    student, teacher = asked_logits(step.student, step), asked_logits(step.teacher, step)
    labels = predict.summed_nats(student, step.targets_BT[step.targets_BT != IGNORED])
    expected = (1 - soft) * float(labels) + soft * float(distill.soft_nats(teacher, student, 2.0))
    if features:
        with torch.no_grad():
            mine, _ = predict.layer_outputs(step.student, step.inputs_BT)
            theirs, _ = predict.layer_outputs(step.teacher, step.inputs_BT)
        pairs = [(mine[0], theirs[1]), (mine[1], theirs[3])]
        distances = [float(distill.feature_distance(one, other)) for one, other in pairs]
        expected += features * len(student) * sum(distances) / 2
    assert float(distill.Method().loss(step, config).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_teacher_gets_no_gradient_and_every_weight_of_the_student_does(step: Step) -> None:
    distill.Method().loss(step, Config(features=1.0)).backward()
    assert all(parameter.grad is None for parameter in step.teacher.parameters())
    assert all(parameter.grad is not None for parameter in step.student.parameters())


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it(step: Step) -> None:
    twin = Step(step.student, model(2, seed=0), step.inputs_BT, step.targets_BT, number=0, seed=0)
    assert float(distill.Method().loss(twin, Config(soft=1.0, features=1.0)).detach()) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(2, 4, [1, 3]), (3, 12, [3, 7, 11]), (2, 3, [0, 2]), (4, 4, [0, 1, 2, 3]), (1, 5, [4])],
)
def test_layers_are_spread_evenly_and_the_last_belongs_to_the_last(
    students: int, teachers: int, expected: list[int]
) -> None:
    assert [distill.same_depth(n, students, teachers) for n in range(students)] == expected
    parent = Shape(layers=teachers)
    assert [distill.Method().source_layer(n, parent, Config(layers=students)) for n in range(students)] == expected


def test_the_student_has_the_sizes_asked_for_and_the_parents_otherwise() -> None:
    parent = Shape(width=64, heads=4, kv_heads=2, ffn_width=96, layers=6)
    assert distill.Method().shape(parent, Config()) == parent
    assert distill.Method().shape(parent, Config(layers=2)) == parent.model_copy(update={"layers": 2})
    narrow = distill.Method().shape(parent, Config(width=32, ffn_width=48, init_from="scratch"))
    assert (narrow.width, narrow.heads, narrow.head_size, narrow.ffn_width, narrow.layers) == (32, 2, 16, 48, 6)


@pytest.mark.parametrize("table", [{"layers": 7}, {"ffn_width": 97, "init_from": "scratch"}])
def test_a_student_larger_than_its_parent_is_refused(table: dict[str, Any]) -> None:
    parent = Shape(width=64, heads=4, ffn_width=96, layers=6)
    with pytest.raises(ValueError, match="is more than the"):
        distill.Method().shape(parent, Config.model_validate(table))


def test_a_narrower_student_cannot_start_from_wider_weights() -> None:
    with pytest.raises(ValidationError, match="need init_from = scratch"):
        Config(width=32)


def test_labels_alone_need_no_teacher() -> None:
    assert not Config(soft=0.0).needs_teacher
    assert Config(soft=0.0, features=0.1).needs_teacher
    assert distill.Method().baselines(Config())["labels only"]["soft"] == 0.0
    assert "labels only" not in distill.Method().baselines(Config(soft=0.0))
