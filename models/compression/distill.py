"""Distillation: a smaller student learns the teacher's distribution over tokens, and its hidden states.

    loss = (1 - a) CE(labels) + a T^2 KL(teacher_T || student_T) + f * features

`features` compares the states after every student layer with those at the same relative depth of the teacher: of equal
widths as || h/|h| - h'/|h'| ||^2, of different ones as the squared difference of the cosines between all tokens of a
sequence, so that no projection has to be learned and thrown away.

The student starts from evenly spread layers of the model that it is made from, or, behind a pruned variant (`from`),
from that variant; the teacher is the pretrained model of the run. The variant is an ordinary, smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.architectures.config import IGNORED, Shape
from models.compression import training_method
from models.compression.training_method import Step, TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


class Config(TrainedConfig):
    """Parameters of distillation."""

    layers: int = Field(0, ge=0, le=512, description="layers of the student; 0: as many as it is made from")
    ffn_width: int = Field(0, ge=0, le=262144, description="feed-forward width of the student; 0: as it is")
    width: int = Field(0, ge=0, le=65536, description="width of the student; 0: as it is; else init_from = scratch")
    init_from: Literal["base", "scratch"] = Field(
        "base", description="evenly spread layers of the model that it is made from, or random weights"
    )
    soft: float = Field(
        0.5, ge=0.0, le=1.0, description="weight of the teacher's distribution; the labels have the rest"
    )
    temperature: float = Field(2.0, gt=0.0, le=100.0, description="temperature of both distributions")
    keep_zeros: bool = Field(False, description="weights that are zero in the base stay zero: for a pruned base")
    features: float = Field(0.0, ge=0.0, le=1000.0, description="weight of the hidden states")

    @property
    def label(self) -> str:
        """For instance `l2`, `l2-features`, `same-labels`."""
        sizes = [f"{key}{size}" for key, size in (("l", self.layers), ("f", self.ffn_width), ("w", self.width)) if size]
        kind_ = ["features"] if self.features else [] if self.soft else ["labels"]
        return "-".join((sizes or ["same"]) + kind_)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from the teacher."""
        return self.soft > 0 or self.features > 0

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.init_from == "scratch"

    @model_validator(mode="after")
    def _zeros_are_those_of_the_base(self) -> Self:
        training_method.refuse_zeros_of_nothing(keep_zeros=self.keep_zeros, from_scratch=self.from_scratch)
        return self

    @model_validator(mode="after")
    def _only_new_students_are_narrower(self) -> Self:
        if self.init_from == "base" and (self.width or self.ffn_width):
            raise ValueError(
                "width and ffn_width need init_from = scratch: a narrower model that keeps weights is made by a method "
                "of kind structure; distil that with `from`"
            )
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def soft_nats(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """Return the summed T^2 KL(teacher || student) of the softened distributions, float32."""
    teacher_log = (teacher_NV.float() / temperature).log_softmax(-1)
    student_log = (student_NV.float() / temperature).log_softmax(-1)
    return temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum()


def feature_distance(student_BTD: Tensor, teacher_BTE: Tensor) -> Tensor:
    """Return the mean squared distance of a token's states, float32: of the states, or of their cosines (see above)."""
    one = torch.nn.functional.normalize(student_BTD.float(), dim=-1)
    other = torch.nn.functional.normalize(teacher_BTE.float(), dim=-1)
    if one.shape == other.shape:
        return (one - other).square().sum(-1).mean()
    return (one @ one.mT - other @ other.mT).square().mean()


def same_depth(layer: int, students: int, teachers: int) -> int:
    """Return the teacher's layer at the relative depth of a student's; the last belongs to the last."""
    return (layer + 1) * teachers // students - 1


# ---------------------------------------------------------------------------------------------------------------------
# The method


class Method(TrainingMethod[Config], config=Config):
    """Distillation."""

    bits: ClassVar[str] = "32, fewer weights"
    paper: ClassVar[str] = "Hinton et al. 2015 (arXiv 1503.02531); features as in OneBit (arXiv 2402.11295)"

    def shape(self, base: Shape, config: Config) -> Shape:
        """Return the shape of the student; heads keep their size where the width shrinks.

        Raises:
            ValueError: a student that is larger than its base, or a width without whole heads.
        """
        changes: dict[str, Any] = {}
        if config.layers:
            changes["layers"] = config.layers
        if config.ffn_width:
            changes["ffn_width"] = config.ffn_width
        if config.width:
            heads = config.width // base.head_size
            changes |= {"width": config.width, "heads": heads, "kv_heads": None if base.kv_heads is None else heads}
        for name, value in changes.items():
            if value is not None and name != "kv_heads" and value > getattr(base, name):
                raise ValueError(f"{name} = {value} is more than the {getattr(base, name)} of the base")
        return Shape.model_validate(base.model_dump(include=set(Shape.model_fields)) | changes)

    def source_layer(self, layer: int, base: Shape, config: Config) -> int:
        """Return the base's layer that a student's layer starts from."""
        return same_depth(layer, config.layers or base.layers, base.layers)

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Leave the layers as they are, but for zeros that are to stay."""
        if config.keep_zeros:
            training_method.keep_zeros(model, names)

    def loss(self, step: Step, config: Config) -> Tensor:
        """Return the weighted sum of labels, teacher and features."""
        from models.architectures import predict

        asked_BT = step.targets_BT != IGNORED
        states, last_BTD = predict.layer_outputs(step.student, step.inputs_BT)
        student_NV = predict.logits(step.student, last_BTD[asked_BT])
        total = (1.0 - config.soft) * predict.summed_nats(student_NV, step.targets_BT[asked_BT])
        if step.teacher is None:
            return total
        with torch.no_grad():
            shown, final_BTE = predict.layer_outputs(step.teacher, step.inputs_BT)
            teacher_NV = predict.logits(step.teacher, final_BTE[asked_BT])
        if config.soft:
            total = total + config.soft * soft_nats(teacher_NV, student_NV, config.temperature)
        if config.features:
            pairs = [(state, shown[same_depth(n, len(states), len(shown))]) for n, state in enumerate(states)]
            distance = torch.stack([feature_distance(one, other) for one, other in pairs]).mean()
            total = total + config.features * len(student_NV) * distance
        return total

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return the same student taught by labels only for equal steps, and as it is before any step."""
        baselines: dict[str, dict[str, Any]] = {"untrained": config.changed("distill", steps=0)}
        if config.needs_teacher:
            baselines["labels only"] = config.changed("distill", soft=0.0, features=0.0)
        return baselines
