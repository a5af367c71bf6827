"""Maestro: linear layers as products of two factors whose components are trained in order, then cut by importance.

A layer starts as the SVD of its weight, W = (U sqrt S) (sqrt S V^T), at full rank. Each step adds three losses:

    the ordinary one, of the full model
    KL(full || cut), of a pass in which one layer (or all) keeps its first b components only, b drawn uniformly
    lambda * sum over layers and b of ||U[:, b:]|| + ||V[:, b:]||: what the first components can do, the last must not

Afterwards components are dropped from the least important on, ||u|| * ||v|| relative to their layer, until the share of
weights asked for is left. A layer whose next component would make its factors as large as its weight takes all of them
and is stored dense, where the share has room for that; otherwise it stops there.

The paper draws one layer a step (`drawn = "one"`) and always has the penalty; neither is the default, because both were
worse here: see docs/results/compression.md.

Layout (ours: plain transformers knows no factored layers): `weight_left` [O, R] and `weight_right` [R, I].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from models.architectures.config import IGNORED
from models.compression import training_method
from models.compression.base import Packed
from models.compression.svd import LowRankPacked
from models.compression.training_method import Step, TrainedConfig, TrainingMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from models.compression.modules.factored import FactoredLinear
else:
    torch = lazy_module("torch")


class Config(TrainedConfig):
    """Parameters of Maestro."""

    share: float = Field(0.5, gt=0.0, le=1.0, description="weights that are left, of those in the layers")
    cut: Literal["end", "start"] = Field(
        "end", description="end: train in order, then cut; start: truncated SVD first, then train what is left"
    )
    drawn: Literal["one", "all"] = Field("all", description="layers that a step cuts: one of them, or all")
    penalty: float = Field(0.0, ge=0.0, le=1.0, description="weight of the group lasso, for each layer")
    allocation: Literal["importance", "uniform"] = Field(
        "importance", description="which components go: the least important of all layers, or as many of each"
    )
    value_bits: Literal[16, 32] = Field(16, description="bits of a stored number: bfloat16 or float32")

    @property
    def label(self) -> str:
        """For instance `r50`, `r50-svd`."""
        return f"r{self.share * 100:g}".replace(".", "p") + ("-svd" if self.cut == "start" else "")


# ---------------------------------------------------------------------------------------------------------------------
# Factors and ranks


def factors(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (left [O, R], right [R, I]) with the singular values shared out equally, largest first."""
    u_OR, s_R, vt_RI = torch.linalg.svd(weight_OI.detach().double(), full_matrices=False)
    root_R = s_R.sqrt()
    return (u_OR * root_R).to(weight_OI.dtype), (root_R.unsqueeze(1) * vt_RI).to(weight_OI.dtype)


def importance(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """Return the importance [R] of each component: its norm over that of all, float64."""
    norm_R = left_OR.detach().double().norm(dim=0) * right_RI.detach().double().norm(dim=1)
    return norm_R / norm_R.norm().clamp(min=1e-30)


def ranks(importances: Sequence[Tensor], shapes: Sequence[tuple[int, int]], share: float, allocation: str) -> list[int]:
    """Return how many components each layer keeps; its full rank stands for a dense layer.

    Args:
        importances: [R] of each layer.
        shapes: (O, I) of each layer.
        share: weights that may be left, of all of them.
        allocation: `uniform` gives every layer the same share.
    """
    if allocation == "uniform":
        return [_uniform_rank(shape, share) for shape in shapes]
    room = share * sum(rows * columns for rows, columns in shapes)
    kept = [1] * len(shapes)
    room -= sum(rows + columns for rows, columns in shapes)
    candidates = sorted(
        (-float(value), layer, place) for layer, of in enumerate(importances) for place, value in enumerate(of) if place
    )
    # Components count from the first on, so a layer whose next one is too dear takes no further ones.
    done: set[int] = set()
    for _, layer, _ in candidates:
        rows, columns = shapes[layer]
        if layer in done:
            continue
        dense = (kept[layer] + 1) * (rows + columns) >= rows * columns
        price = rows * columns - kept[layer] * (rows + columns) if dense else rows + columns
        if room < price:
            done.add(layer)
            continue
        kept[layer] = min(rows, columns) if dense else kept[layer] + 1
        room -= price
        if dense:
            done.add(layer)
    return kept


def _uniform_rank(shape: tuple[int, int], share: float) -> int:
    rows, columns = shape
    rank = max(1, int(share * rows * columns / (rows + columns)))
    return min(rows, columns) if share >= 1.0 else rank


# ---------------------------------------------------------------------------------------------------------------------
# The method


def cut(model: nn.Module, config: Config) -> None:
    """Drop the least important components, in place; a layer that would not become smaller is made dense again."""
    layers = factored(model)
    shapes = [(len(m.left_OR), m.right_RI.shape[1]) for m in layers.values()]
    found = [importance(m.left_OR, m.right_RI) for m in layers.values()]
    kept = ranks(found, shapes, config.share, config.allocation)
    for (name, module), (rows, columns), rank in zip(layers.items(), shapes, kept, strict=True):
        if rank * (rows + columns) >= rows * columns:
            training_method.put_layers(model, {name: dense(module)})
            continue
        module.left_OR = torch.nn.Parameter(module.left_OR.detach()[:, :rank].clone())
        module.right_RI = torch.nn.Parameter(module.right_RI.detach()[:rank].clone())


def factored(model: nn.Module) -> dict[str, FactoredLinear]:
    """Return the factored layers by name."""
    from models.compression.modules.factored import FactoredLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def dense(module: FactoredLinear) -> nn.Linear:
    """Return the layer with its factors multiplied out."""
    weight_OI = module.left_OR.detach() @ module.right_RI.detach()
    linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=module.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight_OI)
    if module.bias is not None:
        linear.bias = module.bias
    return linear


def drawn_rank(place: int, layers: int, left_OR: Tensor, step: Step, config: Config) -> int | None:
    """Return how many components of a layer take part in the cut pass of a step, None for all of them."""
    if config.drawn == "one" and int(layers * training_method.uniform(step.seed, "maestro", step.number)) != place:
        return None
    # Under ZeRO-3 the parameter is elsewhere and only DeepSpeed's own note says what shape it has.
    full = getattr(left_OR, "ds_shape", left_OR.shape)[1]
    return 1 + int(full * training_method.uniform(step.seed, "maestro-rank", step.number, place))


def divergence(target_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Return the summed KL(target || logits) in nats, float32."""
    target_log = target_NV.float().log_softmax(-1)
    return (target_log.exp() * (target_log - logits_NV.float().log_softmax(-1))).sum()


class Method(TrainingMethod[Config], config=Config):
    """Maestro."""

    bits: ClassVar[str] = "16-32, share of weights"
    paper: ClassVar[str] = (
        "Horvath et al. 2023, Maestro: Uncovering Low-Rank Structures via Trainable Decomposition (arXiv 2308.14929)"
    )

    def transform(self, model: nn.Module, names: Sequence[str], config: Config) -> None:
        """Put factors in the place of every named layer."""
        from models.compression.modules.factored import FactoredLinear

        linear = training_method.linear_layers(model, names)
        made = {name: FactoredLinear(module, *factors(module.weight)) for name, module in linear.items()}
        training_method.put_layers(model, made)
        if config.cut == "start":
            cut(model, config)

    def loss(self, step: Step, config: Config) -> Tensor:
        """Return the nats of the full model, the divergence of a cut one from it, and the penalty."""
        from models.architectures import predict

        if config.cut == "start":
            return training_method.language_loss(step)
        layers = list(factored(step.student).values())
        asked_BT = step.targets_BT != IGNORED
        targets_N = step.targets_BT[asked_BT]
        for layer in layers:
            layer.penalized = config.penalty > 0
        full_NV = predict.logits(step.student, predict.hidden_states(step.student, step.inputs_BT)[asked_BT])
        total = predict.summed_nats(full_NV, targets_N)
        if config.penalty > 0:
            penalties = [layer.penalty for layer in layers if layer.penalty is not None]
            total = total + config.penalty / len(layers) * len(targets_N) * torch.stack(penalties).sum()
        for place, layer in enumerate(layers):
            layer.penalized, layer.penalty = False, None
            layer.rank = drawn_rank(place, len(layers), layer.left_OR, step, config)
        cut_NV = predict.logits(step.student, predict.hidden_states(step.student, step.inputs_BT)[asked_BT])
        for layer in layers:
            layer.rank = None
        return total + divergence(full_NV.detach(), cut_NV)

    def finish(self, model: nn.Module, config: Config) -> dict[str, Packed]:
        """Cut the trained layers and return them as stored."""
        if config.cut == "end":
            cut(model, config)
        dtype = torch.bfloat16 if config.value_bits == 16 else torch.float32
        return {
            name: LowRankPacked(layer.left_OR.detach().to(dtype), layer.right_RI.detach().to(dtype))
            for name, layer in factored(model).items()
        }

    def restore(self, tensors: Mapping[str, Tensor], config: Config) -> Packed:  # noqa: ARG002
        """Rebuild a packed weight from its stored tensors."""
        return LowRankPacked(tensors["weight_left"], tensors["weight_right"])

    def baselines(self, config: Config) -> dict[str, dict[str, Any]]:
        """Return truncated SVD of the same share, the same trained for equal steps, and the uncut model trained on."""
        baselines: dict[str, dict[str, Any]] = {
            "svd": config.changed("maestro", steps=0),
            "continued": config.full_precision(),
        }
        if config.cut == "end":
            baselines["svd, then trained"] = config.changed("maestro", cut="start")
        return baselines
