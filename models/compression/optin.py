"""OPTIN: one-shot structured pruning by what the loss of a unit does to the features of all later layers.

Each unit (attention group, or a few neurons) is removed alone. Its importance is how far the *trajectory* moves: for
every block from its own on, the squared difference between the Gram matrices of unit-length token features (manifold
distillation), plus the divergence of the softened predictions. The least important units of each layer go; nothing is
trained. Distil afterwards (`from`) to recover more.

Departures from the released code: it scales a neuron's score by a fixed geometric series over the neuron's number and
rescales the divergence by powers of ten against the features; neither is in the paper, and here both terms are means
with one stated weight. It ranks units of all layers together; here every layer loses the same number, because public
configurations know one width for all layers. With `macs` heads and neurons are ranked together, as there: of all pairs
of numbers that keep to the budget of multiplications, the one that keeps the most importance.

Shapes: K sampled tokens, D width, V vocabulary, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from models.compression.solvers import structured
from models.compression.solvers.structured import MaskedModel, Structure, StructureConfig
from models.compression.structure_method import StructureMethod
from models.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Config(StructureConfig):
    """Parameters of OPTIN."""

    macs: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the multiplications of the layers' matrices that is left, heads and neurons chosen "
        "together; 0: `heads` and `neurons` say",
    )
    divergence: float = Field(1.0, ge=0.0, le=1e6, description="weight of the divergence of predictions")
    temperature: float = Field(4.0, gt=0.0, le=100.0, description="softening of the predictions that are compared")
    neurons_at_once: int = Field(
        1,
        ge=1,
        le=65536,
        description="neurons of similar magnitude that are measured as one: so much faster, and coarser",
    )

    @property
    def label(self) -> str:
        """For instance `h25-n50`, `m60`."""
        return f"m{self.macs * 100:g}".replace(".", "p") if self.macs else super().label

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        fields = StructureConfig.model_fields
        if self.macs and (self.heads, self.neurons) != (fields["heads"].default, fields["neurons"].default):
            raise ValueError("heads and neurons do nothing beside macs, which chooses both; valid: one or the other")
        return self


def manifold_distance(features_KD: Tensor, reference_KD: Tensor) -> Tensor:
    """Return the mean squared difference of the cosines between all pairs of tokens."""
    one, other = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (features_KD, reference_KD))
    return (one @ one.T - other @ other.T).square().mean()


def divergence(logits_KV: Tensor, reference_KV: Tensor, temperature: float) -> Tensor:
    """Return the mean KL(reference || logits) of softened predictions times the squared temperature, nats a token."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (reference_KV, logits_KV))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def importance(
    found: tuple[Sequence[Tensor], Tensor], original: tuple[Sequence[Tensor], Tensor], config: Config
) -> float:
    """Return how far a trajectory is from the original one."""
    features = sum(float(manifold_distance(x, y)) for x, y in zip(found[0], original[0], strict=True))
    return features + config.divergence * float(divergence(found[1], original[1], config.temperature))


def _parts(sizes_U: Tensor, count: int) -> Iterator[Tensor]:
    """Yield masks of `count` units each, neighbours in size."""
    for part in torch.argsort(sizes_U, stable=True).split(count):
        mask_U = torch.zeros_like(sizes_U, dtype=torch.bool)
        mask_U[part] = True
        yield mask_U


def within(model: MaskedModel, scores: Mapping[str, Tensor], macs: float) -> tuple[int, int]:
    """Return how many groups and neurons of each layer to keep: the most importance within a share of the costs.

    Args:
        model: what a unit costs, and how many groups the layout allows.
        scores: importances, `groups` [L, G] and `neurons` [L, F].
        macs: share of the multiplications that may be left.

    Raises:
        ValueError: not even one unit of each kind is within it.
    """
    best = {kind: score_LU.sort(1, descending=True).values.cumsum(1).sum(0) for kind, score_LU in scores.items()}
    room = macs * (model.groups * model.costs["groups"] + model.neurons * model.costs["neurons"])
    found: list[tuple[float, int, int]] = []
    for groups in model.loadable_groups:
        neurons = min(model.neurons, int((room - groups * model.costs["groups"]) // model.costs["neurons"]))
        if neurons >= 1:
            kept = float(best["neurons"][neurons - 1]) + (float(best["groups"][groups - 1]) if groups else 0.0)
            found.append((kept, groups, neurons))
    if not found:
        raise ValueError(f"macs = {macs:g} leaves no neuron beside the fewest heads; valid: a larger share")
    return max(found)[1:]


class Method(StructureMethod[Config], config=Config):
    """OPTIN."""

    paper: ClassVar[str] = (
        "Khaki and Plataniotis 2024, The Need for Speed: Pruning Transformers with One Recipe (arXiv 2403.17921)"
    )

    def select(self, model: MaskedModel, config: Config) -> Structure:
        """Return the structure that keeps the most important units of each layer.

        Raises:
            ValueError: no structure is within `macs`.
        """
        sizes = {kind: size_LU.cpu() for kind, size_LU in model.magnitudes().items()}
        scores = {kind: torch.zeros_like(sizes[kind], dtype=torch.float64) for kind in ("groups", "neurons")}
        for unit_kind, share, at_once in (
            ("groups", config.heads, 1),
            ("neurons", config.neurons, config.neurons_at_once),
        ):
            for layer in range(model.layers if share or config.macs else 0):
                original = model.original(layer)
                for removed_U in _parts(sizes[unit_kind][layer], at_once):
                    moved = importance(model.trajectory(layer, unit_kind, removed_U), original, config)
                    scores[unit_kind][layer, removed_U] = moved
        counts = within(model, scores, config.macs) if config.macs else None
        return structured.keep_best(scores["groups"], scores["neurons"], config, counts)
