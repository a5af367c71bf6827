"""LISA (Pan et al. 2024, arXiv:2403.17919): train a few randomly drawn layers at a time.

Every `interval` steps a new set of layers is drawn; embeddings, the final norm and the head are always trained. Layers
outside the set are frozen and hold no optimizer state. A training loop does, at step 0 and then every K steps:

    layers = draw(seed, step // K, number_of_layers, active)
    names = active_names(model_parameter_names, layers)
    set_requires_grad(model, names)          # weight gradients of frozen layers are not computed
    optimizer.set_active(names)              # their moments are dropped, and no byte of them changes

Every parameter must require a gradient when DeepSpeed's engine is created, since it only ever trains those that do.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
"""Finds the layer number in parameter names of the usual transformers layouts."""


def draw(seed: int, interval: int, layers: int, active: int, weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """Draw the layers to train in an interval, without replacement.

    A pure function, equal on all ranks and machines; no random generator is read or advanced. Each layer gets a uniform
    number u from a hash of (seed, interval, layer); the `active` layers with the smallest -log(u) / weight win, which
    is sampling without replacement with probability in proportion to the weights (Efraimidis & Spirakis 2006).

    Args:
        seed: of the run.
        interval: number of the interval: step // steps per interval.
        layers: how many there are.
        active: how many to draw.
        weights: how likely each layer is to be drawn, not negative; None draws uniformly.

    Returns:
        `active` layer numbers, ascending.

    Raises:
        ValueError: if `active` is not within 0..layers, or the weights do not fit.
    """
    if not 0 <= active <= layers:
        raise ValueError(f"{active} active layers of {layers}: it must be from 0 to {layers}")
    chances = [1.0] * layers if weights is None else [float(weight) for weight in weights]
    if len(chances) != layers:
        raise ValueError(f"{len(chances)} sampling weights for {layers} layers")
    if any(not math.isfinite(chance) or chance < 0 for chance in chances):
        raise ValueError(f"sampling weights must be finite and not negative, got {chances}")
    possible = [layer for layer in range(layers) if chances[layer] > 0]
    if len(possible) < active:
        raise ValueError(f"{active} active layers, but only {len(possible)} have a sampling weight above 0")
    keys = {layer: -math.log(_uniform(seed, interval, layer)) / chances[layer] for layer in possible}
    return tuple(sorted(sorted(possible, key=lambda layer: (keys[layer], layer))[:active]))


def _uniform(seed: int, interval: int, layer: int) -> float:
    """Return a number in (0, 1) from a hash."""
    digest = hashlib.sha256(f"lisa/{seed}/{interval}/{layer}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") // 2048 + 0.5) / 2**53


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter belongs to, None for embeddings, final norm and head."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def active_names(names: Iterable[str], layers: Collection[int]) -> list[str]:
    """Return the parameters to train: those of the given layers and those of no layer."""
    return [name for name in names if layer_of(name) is None or layer_of(name) in layers]


def set_requires_grad(model: nn.Module, names: Collection[str]) -> None:
    """Let gradients be computed for the named parameters only."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def layer_groups(parameters: Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one parameter group for each layer, and one for the rest.

    ZeRO 1 and 2 cut each group into equal parts, one for each rank. With a group for each layer every rank holds its
    share of every layer, so the memory that LISA saves is the same on all, to the padding of a part. In one group of
    many layers a rank owns whole layers: then the rank that owns the drawn ones holds all their moments, and saves
    nothing while the others save everything. ZeRO 3 cuts every tensor, and needs no such groups.

    Args:
        parameters: (name, parameter) pairs, or parameter groups of such pairs; the options of a group (its weight
            decay, say) stay with each of its layers.
    """
    given: list[Any] = list(parameters)
    made: list[dict[str, Any]] = []
    for whole in given if given and isinstance(given[0], Mapping) else [{"params": given}]:
        layers: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in whole["params"]:
            number = layer_of(name)
            layers.setdefault(-1 if number is None else number, []).append((name, parameter))
        made += [{**whole, "params": layers[number]} for number in sorted(layers)]
    return made


def layer_norms(norms: Mapping[str, float], layer: Callable[[str], int | None] = layer_of) -> list[float]:
    """Return the mean weight norm of each layer, from the norms of its tensors (`optimizer.weight_norms()`).

    Raises:
        ValueError: if a layer has no tensor.
    """
    of_layer: dict[int, list[float]] = {}
    for name, norm in norms.items():
        number = layer(name)
        if number is not None:
            of_layer.setdefault(number, []).append(norm)
    if sorted(of_layer) != list(range(len(of_layer))):
        raise ValueError(f"the norms name layers {sorted(of_layer)}: they must number from 0 without a gap")
    return [math.fsum(of_layer[number]) / len(of_layer[number]) for number in range(len(of_layer))]


def importance(tuned: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return sampling weights, summing to 1: how much larger each layer's norm is in one run than in another.

    The paper's motive: LoRA leaves weight norms skewed towards some layers; a layer is drawn in proportion to the ratio
    of its mean norm under the run that shows its importance (`tuned`) and under the other (`reference`).

    Raises:
        ValueError: if the lengths differ or a norm is not positive.
    """
    if len(tuned) != len(reference) or not tuned:
        raise ValueError(f"norms of {len(tuned)} and of {len(reference)} layers: they must be of the same layers")
    if any(not norm > 0 for norm in (*tuned, *reference)):
        raise ValueError("a layer's mean norm is not above 0")
    ratios = [one / other for one, other in zip(tuned, reference, strict=True)]
    return [ratio / math.fsum(ratios) for ratio in ratios]
