"""The step that LAMB, LARS and AdamW share: over fragments, equal on one rank or on many.

A step has two passes, and nothing is written before both are decided on every rank together:

1. *measure*: the norms per tensor of gradient, update and weights, without changing a byte. The sums of squares of all
   tensors go into one float64 vector and through one all-reduce. (Clipping needs the gradient norm before the moments
   are formed: then another all-reduce comes first.)
2. *apply*: moments and weights, fragment by fragment - or nothing at all, on any rank, when a sum was not finite.

The host reads one small vector for each all-reduce; there is no synchronisation per tensor.

Work proceeds in blocks that fit the CPU's cache, so that the many element-wise operations of a step cost one trip to
memory; on a GPU a block is as large as the temporary memory allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.optim import foreach
from models.optim.layout import Fragment, blocks, sums_of_squares
from models.optim.state import Exclude, FragmentState

CPU_BLOCK = 1 << 16
"""Elements worked on at a time on a CPU: 256 KiB for each array."""
GPU_BLOCK = 1 << 26
"""Elements worked on at a time elsewhere: 256 MiB for each temporary."""


@dataclass(frozen=True)
class StepRecord:
    """What the last step did."""

    grad_norm: float
    """Global L2 norm of the active tensors' gradients before clipping; not finite where the step was skipped."""
    skipped: bool
    """Whether nothing was changed, on any rank, because a gradient was not finite."""


@dataclass(frozen=True)
class Batch:
    """Blocks that are treated alike: same hyperparameters, same number of steps behind them."""

    group: Mapping[str, Any]
    decay: float
    step: int
    """1 for the first step of these tensors."""
    tensors: list[int]
    """Position of each block's tensor in the layout."""
    weights: list[Tensor]
    gradients: list[Tensor]
    moments: tuple[list[Tensor], ...]


class FragmentOptimizer(FragmentState):
    """Base of the optimizers; a subclass names its moments and supplies the mathematics of one batch.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as for any torch optimizer.
        defaults: hyperparameters of a group, `lr` and `weight_decay` among them.
        exclude: tensors that get no weight decay and no trust ratio; None excludes nothing.
        max_grad_norm: clip the global norm of the active tensors' gradients; None leaves them as they are. Use either
            this or the engine's own clipping.
    """

    adaptive: ClassVar[bool]
    """Whether updates are scaled by trust ratios, which `measure` and `ratio` supply."""

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, exclude: Exclude | None, max_grad_norm: float | None
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}: it must be above 0, or None for no clipping")
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr is {defaults['lr']}: it must not be negative")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}: it must not be negative")
        self.max_grad_norm = max_grad_norm
        self._pending: dict[int, tuple[Tensor | None, Mapping[str, Any]]] = {}
        self._ratios: dict[str, float] = {}
        self._record = StepRecord(grad_norm=math.nan, skipped=False)
        super().__init__(params, defaults, exclude)

    # ---- what a subclass supplies ---------------------------------------------------------------------------------

    def measure(self, batch: Batch, gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the vectors, one for each block, under and over the fraction line of the trust ratio."""
        raise NotImplementedError

    def ratio(self, under: float, over: float, group: Mapping[str, Any], decay: float) -> float:
        """Return the trust ratio of a tensor from the norms of what `measure` returned."""
        raise NotImplementedError

    def adapts(self, name: str, decay: float) -> bool:  # noqa: ARG002 - a variant of LAMB looks at the decay
        """Tell whether the update of a tensor is scaled by its trust ratio."""
        return name not in self._excluded

    def apply(self, batch: Batch, gradients: list[Tensor], ratios: list[float]) -> None:
        """Update moments and weights of a batch in place; `ratios` holds the factor of each block's tensor."""
        raise NotImplementedError

    # ---- what a step tells ----------------------------------------------------------------------------------------

    @property
    def last_step(self) -> StepRecord:
        """What the last step did; equal on all ranks."""
        if self.layout.skipped():
            return StepRecord(grad_norm=math.inf, skipped=True)
        return self._record

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratio of every tensor that the last step adapted; equal on all ranks."""
        return dict(self._ratios)

    def weight_norms(self) -> dict[str, float]:
        """Return the L2 norm of every tensor's master weights, equal on all ranks; a collective call."""
        sums, index = self._zeros(1), self._index()
        for fragment in self.layout.fragments:
            for ((_, start, size),) in blocks([fragment.numel], CPU_BLOCK):
                sums[0, index[fragment.name]] += sums_of_squares([fragment.master.narrow(0, start, size)])[0]
        return dict(zip(self.layout.shapes, self._reduced(sums)[0].sqrt().tolist(), strict=True))

    # ---- the step -------------------------------------------------------------------------------------------------

    def bind(self, layout: Any) -> None:
        """Take over a layout from an engine; moments and step counts start afresh."""
        self._pending.clear()
        super().bind(layout)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        An engine may call this once for each group; then the last call takes the step for all of them, so that one
        all-reduce serves all and a non-finite gradient anywhere leaves everything unchanged.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        called: set[int] = set()
        for group in self.param_groups:
            for owner in group["params"]:
                called.add(id(owner))
                self._pending[id(owner)] = (owner.grad, group)
        owners = self.layout.owners
        if all(id(owner) in self._pending for owner in owners):
            self._step()
            self._pending.clear()
            earlier = [owner for owner in owners if id(owner) not in called]
            if earlier and self.layout.publish is not None:
                self.layout.publish(earlier)
        return loss

    def _step(self) -> None:
        batches, self._ratios, clip = self._batches(), {}, 1.0
        if not self.adaptive or self.max_grad_norm is not None:
            norm = self._recorded_norm(self._gradient_sums(batches))
            if self._record.skipped:
                return
            if self.max_grad_norm is not None:
                clip = min(1.0, self.max_grad_norm / (norm + 1e-6))
        factors = [1.0] * len(self.layout.shapes)
        if self.adaptive:
            sums = self._measured(batches, clip)
            self._recorded_norm(sums, clip)
            if self._record.skipped:
                return
            factors = self._factors(sums.sqrt())
        for batch in batches:
            self.apply(batch, _scaled(batch.gradients, clip), [factors[tensor] for tensor in batch.tensors])
        for name in self._taking_part():
            self._counters[name] = self._counters.get(name, 0) + 1

    def _recorded_norm(self, sums: Tensor, clip: float = 1.0) -> float:
        norm = math.sqrt(float(sums[0].sum())) / clip
        self._record = StepRecord(norm, skipped=not bool(torch.isfinite(sums).all()))
        return norm

    def _taking_part(self) -> list[str]:
        """Return the tensors with a gradient, on this rank or another, that are active."""
        homes = self.layout.homes
        return [name for name in homes if self._is_active(name) and self._pending[id(homes[name])][0] is not None]

    def _decay(self, name: str) -> float:
        return 0.0 if name in self._excluded else float(self._pending[id(self.layout.homes[name])][1]["weight_decay"])

    def _batches(self) -> list[Batch]:
        """Cut the fragments that take part into blocks, and gather blocks that are treated alike."""
        part = set(self._taking_part())
        alike: dict[tuple[int, float, int], list[Fragment]] = {}
        for fragment in self.layout.fragments:
            if fragment.name in part:
                group = self._pending[id(fragment.owner)][1]
                key = (id(group), self._decay(fragment.name), self._counters.get(fragment.name, 0) + 1)
                alike.setdefault(key, []).append(fragment)
        return [batch for (_, decay, step), fragments in alike.items() for batch in self._cut(fragments, decay, step)]

    def _cut(self, fragments: list[Fragment], decay: float, step: int) -> list[Batch]:
        group = self._pending[id(fragments[0].owner)][1]
        index = self._index()
        states = [self._allocated(fragment) for fragment in fragments]
        arrays = [
            [fragment.master for fragment in fragments],
            [self._gradient(fragment) for fragment in fragments],
            *([state[name] for state in states] for name in self.moment_names),
        ]
        batches = []
        limit = CPU_BLOCK if fragments[0].owner.device.type == "cpu" else GPU_BLOCK
        for pieces in blocks([fragment.numel for fragment in fragments], limit):
            weights, gradients, *moments = [[array[i].narrow(0, at, n) for i, at, n in pieces] for array in arrays]
            tensors = [index[fragments[i].name] for i, _, _ in pieces]
            batches.append(Batch(group, decay, step, tensors, weights, gradients, tuple(moments)))
        return batches

    def _gradient(self, fragment: Fragment) -> Tensor:
        gradient = self._pending[id(fragment.owner)][0]
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(f"{fragment.name}: the gradient is sparse; {type(self).__name__} needs a dense one")
        return fragment.of(gradient.contiguous().to(fragment.owner.dtype))

    def _gradient_sums(self, batches: list[Batch]) -> Tensor:
        """Return the sums of squares [1, tensors] of the gradients, on the host."""
        sums = self._zeros(1)
        for batch in batches:
            _add_at(sums[0], batch.tensors, sums_of_squares(batch.gradients))
        return self._reduced(sums)

    def _measured(self, batches: list[Batch], clip: float) -> Tensor:
        """Return the sums of squares [3, tensors] of gradient and of what `measure` gives, on the host."""
        sums = self._zeros(3)
        for batch in batches:
            gradients = _scaled(batch.gradients, clip)
            for row, vectors in enumerate((gradients, *self.measure(batch, gradients))):
                _add_at(sums[row], batch.tensors, sums_of_squares(vectors))
        return self._reduced(sums)

    def _factors(self, norms: Tensor) -> list[float]:
        """Return what scales each tensor's update: its trust ratio, or 1 where it is not adapted."""
        factors, index = [1.0] * len(self.layout.shapes), self._index()
        values = norms.T.tolist()
        for name in self._taking_part():
            decay = self._decay(name)
            if self.adapts(name, decay):
                _, under, over = values[index[name]]
                group = self._pending[id(self.layout.homes[name])][1]
                self._ratios[name] = factors[index[name]] = self.ratio(under, over, group, decay)
        return factors

    def _index(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.layout.shapes)}

    def _zeros(self, rows: int) -> Tensor:
        device = self.layout.owners[0].device
        return torch.zeros(rows, len(self.layout.shapes), dtype=torch.float64, device=device)

    def _reduced(self, sums: Tensor) -> Tensor:
        return (sums if self.layout.reduce is None else self.layout.reduce(sums)).cpu()


def _scaled(gradients: list[Tensor], clip: float) -> list[Tensor]:
    return gradients if clip == 1.0 else list(foreach.mul(gradients, clip))


def _add_at(totals: Tensor, positions: list[int], values: Tensor) -> None:
    totals.index_add_(0, torch.tensor(positions, device=totals.device), values)
