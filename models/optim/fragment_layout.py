"""Which part of which tensor this rank updates, and how sums over tensors become sums over ranks.

Under ZeRO a rank holds a flat partition of many tensors' elements. A *fragment* is the intersection of one tensor with
one partition. Per-tensor quantities are sums over fragments, here and on the other ranks:

    tensors     |--a--|------b------|-c-|----d----|
    partitions  [      rank 0      |      rank 1      ]      (the end of rank 1 is alignment padding: no fragment)
    fragments    a     b.0           b.1  c    d

Without ZeRO every partition is a parameter and has exactly one fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    partition: Tensor
    """The fp32 partition, or the parameter itself, whose `.grad` the engine fills."""
    offset: int = 0
    """Where the fragment begins in the flattened partition."""

    @property
    def master(self) -> Tensor:
        """Live 1-D view of the fp32 master weights, [numel]."""
        return self.of(self.partition)

    @property
    def whole(self) -> bool:
        """Whether the partition holds this fragment and nothing else."""
        return self.numel == self.partition.numel()

    def of(self, like: Tensor) -> Tensor:
        """Return the 1-D view of this fragment in a tensor laid out like the partition (a gradient, a moment)."""
        flat = like.detach().view(-1)
        return flat if flat.numel() == self.numel else flat.narrow(0, self.offset, self.numel)


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
    partition_of: dict[str, Tensor]
    """The partition on this rank that belongs to each tensor's group, whether or not it holds a part of the tensor."""
    reduce: Callable[[Tensor], Tensor] | None = None
    """Sums a tensor over the ranks that share the tensors; None where each rank holds them whole."""
    copy_to_weights: Callable[[Sequence[Tensor]], None] | None = None
    """Copies partitions to the live weights, for engines that do so before the step is complete."""
    skipped: Callable[[], bool] = nobody_skips
    """Whether the engine itself skipped the last step (non-finite gradients), so that `step()` was not called."""

    @property
    def partitions(self) -> list[Tensor]:
        """All partitions of this rank; a step is complete when each has been passed to `step()`."""
        return list({id(partition): partition for partition in self.partition_of.values()}.values())


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


class TensorSums:
    """Sums per tensor, collected block by block and added up in float64 over blocks and ranks.

    Args:
        rows: how many sums are kept of each tensor.
        layout: where the tensors live.
    """

    def __init__(self, rows: int, layout: Layout) -> None:
        self._layout = layout
        self._rows = rows
        self._scalars: list[Tensor] = []
        self._scalar_places: list[int] = []
        self._vectors: list[Tensor] = []
        self._vector_places: list[int] = []
        self.device = layout.partitions[0].device

    def add(self, tensor: int, row: int, parts: Sequence[Tensor]) -> None:
        """Add scalars to one sum of the tensor at position `tensor`."""
        self._scalar_places += [row * len(self._layout.shapes) + tensor] * len(parts)
        self._scalars += parts

    def add_rows(self, tensors: Sequence[int], values: Tensor) -> None:
        """Add a vector, a row of `values` [tensors, rows], to the sums of each of these tensors."""
        stride = len(self._layout.shapes)
        self._vector_places += [row * stride + tensor for tensor in tensors for row in range(self._rows)]
        self._vectors.append(values.double().reshape(-1))

    def over_ranks(self) -> Tensor:
        """Return the sums [rows, tensors], float64, on the host: one all-reduce and one copy from the device."""
        sums = torch.zeros(self._rows * len(self._layout.shapes), dtype=torch.float64, device=self.device)
        values = [*([torch.stack(self._scalars).double()] if self._scalars else []), *self._vectors]
        if values:
            places = torch.tensor(self._scalar_places + self._vector_places, device=self.device)
            sums.index_add_(0, places, torch.cat(values))
        sums = sums.view(self._rows, -1)
        return (sums if self._layout.reduce is None else self._layout.reduce(sums)).cpu()
