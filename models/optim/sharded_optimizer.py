"""The step that LAMB, LARS and AdamW share: over fragments, equal on one rank or on many.

A step has two passes, and nothing is written before both are decided on every rank together:

1. *measure*: the norms per tensor of gradient, update and weights, without changing a byte. The sums of squares of all
   tensors go into one float64 vector and through one all-reduce. (Clipping needs the gradient norm before the moments
   are formed: then another all-reduce comes first.)
2. *apply*: moments and weights, fragment by fragment - or nothing at all, on any rank, when a sum was not finite.

The host reads one small vector for each all-reduce; there is no synchronisation per tensor.

What a step costs is trips to memory. Per parameter, in float32, `apply` reads 16 bytes and writes 12 in one fused
kernel, as torch's fused AdamW does; `measure` reads the same 16 bytes once more (with momentum alone: 12), because a
step that can still be skipped may not write. Uncompiled, `measure` works in blocks that fit the CPU's cache, so that
its operations share that one trip; compiled, it is one kernel. Tensors without a trust ratio are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.optim import kernels, native
from models.optim.fragment_layout import Fragment, TensorSums
from models.optim.fragment_state import Exclude, FragmentState

CPU_BLOCK = 1 << 16
"""Elements that one thread of a CPU works on at a time: 256 KiB for each array."""
GPU_BLOCK = 1 << 26
"""Elements worked on at a time elsewhere: 256 MiB for each temporary."""


@dataclass(frozen=True)
class StepRecord:
    """What the last step did."""

    grad_norm: float
    """Global L2 norm of the active tensors' gradients before clipping; not finite where the step was skipped."""
    skipped: bool
    """Whether nothing was changed, on any rank, because a gradient was not finite."""


class Span(NamedTuple):
    """What a step needs of a fragment, or of a block of one: 1-D views of the same length."""

    tensor: int
    """Position of the tensor in the layout."""
    group: Mapping[str, Any]
    decay: float
    step: int
    """1 for the first step of this tensor."""
    adapted: bool
    """Whether the update is scaled by a trust ratio."""
    weights: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return self.weights.numel()

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """Weights, gradient and moments."""
        return (self.weights, self.gradient, *self.moments)

    def cut(self, sizes: int | list[int]) -> list[Span]:
        """Cut into spans of these sizes, or of equal size but for the last."""
        pieces = zip(*(array.split(sizes) for array in self.arrays), strict=True)
        return [
            self._replace(weights=weights, gradient=gradient, moments=tuple(moments))
            for weights, gradient, *moments in pieces
        ]

    def blocks(self, limit: int) -> list[Span]:
        """Cut into spans of at most `limit` elements."""
        return self.cut(limit) if self.numel > limit else [self]


class FragmentOptimizer(FragmentState):
    """Base of the optimizers; a subclass names its moments and supplies the mathematics of one fragment.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as for any torch optimizer.
        defaults: hyperparameters of a group, `lr` and `weight_decay` among them.
        exclude: tensors that get no weight decay and no trust ratio; None excludes nothing.
        max_grad_norm: clip the global norm of the active tensors' gradients, in place as `clip_grad_norm_` does; None
            leaves them as they are. Use either this or the engine's own clipping.
        compiled: one pass over memory to measure and one to apply: on a CPU, for float32, in C++ that is compiled at
            first use; on a GPU `torch.compile`, which needs Triton, measures. Results differ by rounding.
    """

    adaptive: ClassVar[bool]
    """Whether updates are scaled by trust ratios, which `measure` and `ratio` supply."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        exclude: Exclude | None,
        max_grad_norm: float | None,
        compiled: bool = False,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}: it must be above 0, or None for no clipping")
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr is {defaults['lr']}: it must not be negative")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}: it must not be negative")
        self.max_grad_norm = max_grad_norm
        self.compiled = compiled
        self._pending: dict[int, tuple[Tensor | None, Mapping[str, Any]]] = {}
        self._ratios: dict[str, float] = {}
        self._record = StepRecord(grad_norm=math.nan, skipped=False)
        super().__init__(params, defaults, exclude)

    # ---- what a subclass supplies ---------------------------------------------------------------------------------

    rule: native.Rule
    """The name of the rule in `native.cpp`."""
    update: kernels.Update
    """The vector under the fraction line of the trust ratio as plain arithmetic, to be compiled."""

    def scalars(self, span: Span) -> list[float]:
        """Return the numbers that `update` gets besides the tensors, and the native rule before the rate."""
        raise NotImplementedError

    def step_scalars(self, span: Span, ratio: float) -> list[float]:
        """Return the numbers that make the native rule take the step, the rate last."""
        raise NotImplementedError

    def measure(self, span: Span, scratch: Tensor) -> Tensor:
        """Return what `update` does, by fast operations; `scratch` is [moments + 1, length of the span]."""
        raise NotImplementedError

    def ratio(self, under: float, over: float, group: Mapping[str, Any], decay: float) -> float:
        """Return the trust ratio of a tensor from the norms of what `measure` returned."""
        raise NotImplementedError

    def adapts(self, name: str, decay: float) -> bool:  # noqa: ARG002 - a variant of LAMB looks at the decay
        """Tell whether the update of a tensor is scaled by its trust ratio."""
        return name not in self._excluded

    def apply(self, spans: list[Span], ratio: float) -> None:
        """Update moments and weights in place, of spans that differ in nothing but their tensors."""
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
        sums, index = TensorSums(1, self.layout), self._index()
        for fragment in self.layout.fragments:
            sums.add(index[fragment.name], 0, kernels.squares(fragment.master))
        return dict(zip(self.layout.shapes, sums.over_ranks()[0].sqrt().tolist(), strict=True))

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
            for partition in group["params"]:
                called.add(id(partition))
                self._pending[id(partition)] = (partition.grad, group)
        partitions = self.layout.partitions
        if all(id(partition) in self._pending for partition in partitions):
            self._step()
            self._pending.clear()
            earlier = [partition for partition in partitions if id(partition) not in called]
            if earlier and self.layout.copy_to_weights is not None:
                self.layout.copy_to_weights(earlier)
        return loss

    def _step(self) -> None:
        spans, self._ratios = self._spans(), {}
        if not self.adaptive or self.max_grad_norm is not None:
            norm = self._recorded_norm(self._gradient_sums(spans))
            if self._record.skipped:
                return
            self._clip(spans, norm)
        factors = [1.0] * len(self.layout.shapes)
        if self.adaptive:
            sums = self._measured(spans)
            if self.max_grad_norm is None:
                self._recorded_norm(sums)
            elif not bool(torch.isfinite(sums).all()):
                self._record = StepRecord(self._record.grad_norm, skipped=True)
            if self._record.skipped:
                return
            factors = self._factors(sums.sqrt())
        self._apply(spans, factors)
        for name in self._taking_part():
            self._counters[name] = self._counters.get(name, 0) + 1

    def _recorded_norm(self, sums: Tensor) -> float:
        norm = math.sqrt(float(sums[0].sum()))
        self._record = StepRecord(norm, skipped=not bool(torch.isfinite(sums).all()))
        return norm

    def _taking_part(self) -> list[str]:
        """Return the tensors with a gradient, on this rank or another, that are active."""
        partition_of = self.layout.partition_of
        return [
            name
            for name in partition_of
            if self._is_active(name) and self._pending[id(partition_of[name])][0] is not None
        ]

    def _decay(self, name: str) -> float:
        return (
            0.0
            if name in self._excluded
            else float(self._pending[id(self.layout.partition_of[name])][1]["weight_decay"])
        )

    def _spans(self) -> list[Span]:
        """Return the fragments that take part, with their arrays."""
        part, index, spans = set(self._taking_part()), self._index(), []
        for fragment in self.layout.fragments:
            name = fragment.name
            if name in part:
                state, decay = self._allocated(fragment), self._decay(name)
                span = Span(
                    tensor=index[name],
                    group=self._pending[id(fragment.partition)][1],
                    decay=decay,
                    step=self._counters.get(name, 0) + 1,
                    adapted=self.adaptive and self.adapts(name, decay),
                    weights=fragment.master,
                    gradient=self._gradient(fragment),
                    moments=tuple(state[moment] for moment in self.moment_names),
                )
                spans.append(span)
        return spans

    def _gradient(self, fragment: Fragment) -> Tensor:
        gradient = self._pending[id(fragment.partition)][0]
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(f"{fragment.name}: the gradient is sparse; {type(self).__name__} needs a dense one")
        return fragment.of(gradient.contiguous().to(fragment.partition.dtype))

    def _gradient_sums(self, spans: list[Span]) -> Tensor:
        """Return the sums of squares [1, tensors] of the gradients, on the host."""
        sums = TensorSums(1, self.layout)
        for span in spans:
            sums.add(span.tensor, 0, kernels.squares(span.gradient))
        return sums.over_ranks()

    def _clip(self, spans: list[Span], norm: float) -> None:
        """Scale gradients in place, so that both passes over them need no further arithmetic."""
        if self.max_grad_norm is None or not spans:  # a rank may hold no part of any active tensor
            return
        if (factor := self.max_grad_norm / (norm + 1e-6)) < 1.0:
            torch._foreach_mul_([span.gradient for span in spans], factor)

    def _measured(self, spans: list[Span]) -> Tensor:
        """Return the sums of squares [3, tensors] of gradient, update and weights, on the host."""
        sums = TensorSums(3, self.layout)
        limit = GPU_BLOCK if sums.device.type == "cuda" else CPU_BLOCK * torch.get_num_threads()
        scratch: dict[tuple[int, torch.dtype], Tensor] = {}
        by_native = [span for span in spans if self._is_native(span)]
        if by_native:
            sums.add_rows([span.tensor for span in by_native], self._measured_natively(by_native))
        for span in spans:
            if self._is_native(span):
                continue
            if not span.adapted:
                sums.add(span.tensor, 0, kernels.squares(span.gradient))
                continue
            rest = self._measured_by_torch(span, sums) if self.compiled and span.weights.is_cuda else [span]
            for block in (block for part in rest for block in part.blocks(limit)):
                key = block.numel, block.weights.dtype
                if key not in scratch:
                    scratch[key] = block.weights.new_empty(len(self.moment_names) + 1, block.numel)
                vectors = block.gradient, self.measure(block, scratch[key]), block.weights
                for row, vector in enumerate(vectors):
                    sums.add(span.tensor, row, kernels.squares(vector))
        return sums.over_ranks()

    def _is_native(self, span: Span) -> bool:
        weights = span.weights
        return self.compiled and weights.device.type == "cpu" and weights.dtype == torch.float32

    def _measured_natively(self, spans: list[Span]) -> Tensor:
        scalars = [[*self.scalars(span), 0.0] for span in spans]
        return native.measure(self.rule, [span.arrays for span in spans], scalars, [span.adapted for span in spans])

    def _measured_by_torch(self, span: Span, sums: TensorSums) -> list[Span]:
        """Measure what fills whole rows; return what is left."""
        length = kernels.whole_rows(span.numel)
        if not length:
            return [span]
        head, *rest = span.cut([length, span.numel - length]) if length < span.numel else [span]
        # Without .data, torch.compile would look at the tensors that these are views of, and compile for each anew.
        weights, gradient, *moments = (array.data for array in head.arrays)
        scalars = torch.tensor(self.scalars(span), dtype=weights.dtype, device=weights.device)
        sums.add_rows([span.tensor], kernels.compiled_sums(self.update)(weights, gradient, moments, scalars)[None])
        return rest

    def _apply(self, spans: list[Span], factors: list[float]) -> None:
        """Update all spans, last first: their arrays are the ones that a cache may still hold from measuring."""
        if by_native := [span for span in spans if self._is_native(span)]:
            scalars = [self.step_scalars(span, factors[span.tensor]) for span in by_native]
            native.apply(self.rule, [span.arrays for span in by_native], scalars)
        alike: dict[Any, list[Span]] = {}
        for span in reversed(spans):
            if not self._is_native(span):
                own = span.tensor if span.adapted else None
                alike.setdefault((own, id(span.group), span.decay, span.step, span.weights.dtype), []).append(span)
        for members in alike.values():
            self.apply(members, factors[members[0].tensor])

    def _factors(self, norms: Tensor) -> list[float]:
        """Return what scales each tensor's update: its trust ratio, or 1 where it is not adapted."""
        factors, index = [1.0] * len(self.layout.shapes), self._index()
        values = norms.T.tolist()
        for name in self._taking_part():
            decay = self._decay(name)
            if self.adapts(name, decay):
                _, under, over = values[index[name]]
                group = self._pending[id(self.layout.partition_of[name])][1]
                self._ratios[name] = factors[index[name]] = self.ratio(under, over, group, decay)
        return factors

    def _index(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.layout.shapes)}
