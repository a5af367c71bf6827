"""What the optimizers remember: moments per fragment, step counts per tensor, and which tensors are active.

Moments live in one of two places. While every tensor is active, one flat buffer per partition in `optimizer.state`,
where torch's and DeepSpeed's own checkpoints look for it. Once tensors come and go (LISA), one buffer per fragment, so
that memory falls to the active share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.optim.fragment_layout import Fragment, Layout, whole_tensors

Exclude = Callable[[str, tuple[int, ...]], bool]
"""Tells from the name and shape of a tensor that it is excluded from weight decay and adaptation."""


def one_dimensional(name: str, shape: tuple[int, ...]) -> bool:  # noqa: ARG001 - an Exclude sees both
    """Exclude biases and the gains of norms: every tensor with fewer than two axes."""
    return len(shape) < 2


class FragmentState(Optimizer):
    """An optimizer's memory, addressed by fragment.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as for any torch optimizer.
        defaults: hyperparameters of a group.
        exclude: tensors that get no weight decay and no trust ratio; None excludes nothing.
    """

    moment_names: ClassVar[tuple[str, ...]]

    def __init__(self, params: Any, defaults: dict[str, Any], exclude: Exclude | None) -> None:
        self.exclude = exclude
        self._layout: Layout | None = None
        self._active: frozenset[str] | None = None
        self._pieces: dict[str, dict[str, Tensor]] = {}
        self._counters: dict[str, int] = {}
        super().__init__(params, defaults)

    # ---- where tensors live ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any torch optimizer; before the optimizer is bound to an engine."""
        super().add_param_group(param_group)
        self._layout = None

    def bind(self, layout: Layout) -> None:
        """Take over a layout from an engine; moments and step counts start afresh."""
        self.state.clear()
        self._pieces.clear()
        self._counters.clear()
        self._active = None
        self._use(layout)

    def _use(self, layout: Layout) -> None:
        for fragment in layout.fragments:
            if fragment.partition.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{fragment.name}: master weights are {fragment.partition.dtype}; float32 is needed, because "
                    "updates smaller than the rounding of a half-precision weight would be lost"
                )
        self._layout = layout
        self._excluded = {name for name, shape in layout.shapes.items() if self.exclude and self.exclude(name, shape)}

    @property
    def layout(self) -> Layout:
        """Where the tensors live: the bound layout, or one whole fragment for each parameter."""
        if self._layout is None:
            self._use(whole_tensors(self.param_groups))
        assert self._layout is not None
        return self._layout

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's fragments."""
        return list(self.layout.fragments)

    # ---- moments --------------------------------------------------------------------------------------------------

    def fragment_state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return live 1-D views of a fragment's moments by name; empty where none are allocated."""
        if fragment.name in self._pieces:
            return dict(self._pieces[fragment.name])
        flat = self.state.get(fragment.partition, {})
        return {name: fragment.of(flat[name]) for name in self.moment_names if name in flat}

    def load_fragment_state(self, fragment: Fragment, tensors: Mapping[str, Tensor]) -> None:
        """Copy moments in, allocating them; an empty mapping drops what is there.

        Raises:
            ValueError: if the names are not this optimizer's moments, or a size differs.
        """
        if not tensors:
            self._drop({fragment.name})
            return
        if set(tensors) != set(self.moment_names):
            kept = ", ".join(self.moment_names)
            raise ValueError(f"{fragment.name}: got moments {', '.join(tensors)}, {type(self).__name__} keeps {kept}")
        for name, tensor in tensors.items():
            if tensor.numel() != fragment.numel:
                raise ValueError(f"{fragment.name}: {name} has {tensor.numel()} elements, not {fragment.numel}")
        for name, target in self._allocated(fragment).items():
            target.copy_(tensors[name].reshape(-1))

    def state_bytes(self) -> int:
        """Return the bytes of moments allocated on this rank."""
        flat = [tensor for state in self.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
        pieces = [tensor for piece in self._pieces.values() for tensor in piece.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*flat, *pieces))

    def _allocated(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return the moments of a fragment, zeros where there were none."""
        if held := self.fragment_state(fragment):
            return held
        cut = any(other.name in self._pieces for other in self._beside(fragment))
        if fragment.whole or (self._active is None and not cut):
            flat = {name: torch.zeros_like(fragment.partition, requires_grad=False) for name in self.moment_names}
            self.state[fragment.partition].update(flat)
        else:
            self._pieces[fragment.name] = {name: torch.zeros_like(fragment.master) for name in self.moment_names}
        return self.fragment_state(fragment)

    def _beside(self, fragment: Fragment) -> list[Fragment]:
        return [other for other in self.layout.fragments if other.partition is fragment.partition]

    def _drop(self, names: Collection[str]) -> None:
        """Free the moments of tensors; flat moments that other tensors share are cut into pieces first."""
        for fragment in self.layout.fragments:
            if fragment.name not in names:
                continue
            if fragment.partition in self.state and not fragment.whole:
                for other in self._beside(fragment):
                    views = self.fragment_state(other)
                    self._pieces[other.name] = {name: view.clone() for name, view in views.items()}
            self.state.pop(fragment.partition, None)
            self._pieces.pop(fragment.name, None)

    # ---- step counts and the active set ---------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return how many steps the moments of each tensor have behind them; the same on all ranks."""
        return {name: self._counters.get(name, 0) for name in self.layout.shapes}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Set the step counts.

        Raises:
            ValueError: if a tensor is unknown.
        """
        self._check_known(counters)
        self._counters = {name: int(count) for name, count in counters.items()}

    def set_active(self, names: Collection[str] | None) -> None:
        """Choose the tensors that `step()` may touch; the others keep every byte and hold no moments.

        Moments of tensors that leave are dropped, so that a tensor that returns starts anew, bias correction
        included. Call it with the same names on every rank.

        Args:
            names: tensors to train; None for all.

        Raises:
            ValueError: if a name is unknown.
        """
        if names is None:
            self._active = None
            return
        self._check_known(names)
        self._active = frozenset(names)
        leaving = set(self.layout.shapes) - self._active
        self._drop(leaving)
        for name in leaving:
            self._counters.pop(name, None)

    def _is_active(self, name: str) -> bool:
        return self._active is None or name in self._active

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self.layout.shapes))
        if unknown:
            some = ", ".join(list(self.layout.shapes)[:3])
            raise ValueError(f"no tensor is named {', '.join(unknown[:3])}; the names are like {some}")

    # ---- torch's own checkpoints ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with the step counts under `counters`.

        Raises:
            ValueError: while moments are held per fragment (LISA on a sharded engine), which torch's format cannot
                express; save `fragment_state` of each of the `fragments` instead.
        """
        if self._pieces:
            raise ValueError(
                "moments are held per fragment (LISA under ZeRO), which a torch state dict cannot express; save "
                "fragment_state() of each fragment, and counters(), instead"
            )
        return {**super().state_dict(), "counters": self.counters()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._counters = dict(state_dict.get("counters", {}))
