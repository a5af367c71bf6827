"""Which part of which tensor this rank updates, and how sums over tensors become sums over ranks.

Under ZeRO a rank holds a flat slice ("owner") of many tensors' elements. A *fragment* is the intersection of one tensor
with one slice. Per-tensor quantities are sums over fragments, here and on the other ranks:

    tensors   |--a--|------b------|-c-|----d----|
    owners    [      rank 0      |      rank 1      ]      (the end of rank 1 is alignment padding: no fragment)
    fragments  a     b.0           b.1  c    d

Without ZeRO every owner is a parameter and has exactly one fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.optim import foreach


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of one tensor that this rank updates."""

    name: str
    """Name of the parameter in the model."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Where the fragment begins in the flattened tensor."""
    numel: int
    owner: Tensor
    """The fp32 partition, or the parameter itself, whose `.grad` the engine fills."""
    offset: int = 0
    """Where the fragment begins in the flattened owner."""

    @property
    def master(self) -> Tensor:
        """Live 1-D view of the fp32 master weights, [numel]."""
        return self.of(self.owner)

    @property
    def whole(self) -> bool:
        """Whether the owner holds this fragment and nothing else."""
        return self.numel == self.owner.numel()

    def of(self, owner_like: Tensor) -> Tensor:
        """Return the 1-D view of this fragment in a tensor laid out like the owner (a gradient, a moment)."""
        return owner_like.detach().view(-1).narrow(0, self.offset, self.numel)


def nobody_skips() -> bool:
    """Tell that there is no engine that could have skipped a step."""
    return False


@dataclass(frozen=True)
class Layout:
    """Everything an optimizer must know about where tensors live."""

    fragments: tuple[Fragment, ...]
    """This rank's, in the order of `shapes`."""
    shapes: dict[str, tuple[int, ...]]
    """All tensors of the model, same order on all ranks."""
    homes: dict[str, Tensor]
    """The owner on this rank that belongs to each tensor's group, whether or not it holds a part of the tensor."""
    reduce: Callable[[Tensor], Tensor] | None = None
    """Sums a tensor over the ranks that share the tensors; None where each rank holds them whole."""
    publish: Callable[[Sequence[Tensor]], None] | None = None
    """Copies owners to the live weights, for engines that do so before the step is complete."""
    skipped: Callable[[], bool] = nobody_skips
    """Whether the engine itself skipped the last step (non-finite gradients), so that `step()` was not called."""

    @property
    def owners(self) -> list[Tensor]:
        """All owners of this rank; a step is complete when each has been passed to `step()`."""
        return list({id(owner): owner for owner in self.homes.values()}.values())


def whole_tensors(groups: Sequence[Mapping[str, Any]]) -> Layout:
    """Return the layout without sharding: one fragment for each parameter, named `group0.param1` where nameless.

    Raises:
        ValueError: if a parameter is not contiguous, or two have the same name.
    """
    parameters: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        names = group.get("param_names") or [f"group{number}.param{index}" for index in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            if name in parameters:
                raise ValueError(f"two parameters are named {name}")
            if not parameter.is_contiguous():
                raise ValueError(f"{name} is not contiguous in memory; call .contiguous() on it first")
            parameters[name] = parameter
    fragments = tuple(
        Fragment(name, tuple(parameter.shape), 0, parameter.numel(), parameter)
        for name, parameter in parameters.items()
    )
    return Layout(fragments, {fragment.name: fragment.shape for fragment in fragments}, parameters)


def blocks(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut tensors into blocks of at most `limit` elements and gather small ones, in order.

    Args:
        sizes: elements of each tensor.
        limit: most elements in one list of pieces; what fits a cache, or a budget of temporary memory.

    Yields:
        Lists of pieces `(tensor index, start, length)` with at most `limit` elements together.
    """
    pieces: list[tuple[int, int, int]] = []
    room = limit
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            length = min(size - start, limit)
            if length > room:
                yield pieces
                pieces, room = [], limit
            pieces.append((index, start, length))
            start, room = start + length, room - length
    if pieces:
        yield pieces


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each 1-D tensor, float64 [len(tensors)].

    Accurate to about 1e-7 for blocks up to 2^16 elements on a CPU (dot products keep many partial sums). A sum beyond
    the range of float32 comes out as infinity.
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([torch.dot(tensor, tensor) for tensor in tensors]).double()
    return torch.stack(foreach.norm(list(tensors))).double().square()
