"""A second device on a machine without one: tensors that hold their numbers on the CPU, but refuse to meet CPU tensors.

    with FakeDevice() as fake:
        layer.to(DEVICE)                             # any `.to(DEVICE)` or `device=DEVICE` inside the block
        packed = method.compress(weight.to(DEVICE), statistics, config)
        assert packed.dequantize().device == DEVICE
    host(tensor)      # the numbers, to compare with a result of the CPU; counts as no copy
    fake.to_host      # shapes of all tensors that were copied to the CPU, in order
    fake.syncs        # how often a number was read on the host: `.item()`, `float(x)`, `if x:`

To drive a stage, let the one function that chooses devices return `DEVICE`:

    monkeypatch.setattr(compute, "torch_device", lambda _config: DEVICE)

An operation that meets both devices raises as under CUDA, by its name: a factory without `device=`, a model and a batch
that are apart, a table that stayed behind. As under CUDA, a CPU tensor without dimensions may meet the device, CPU
indices may index on it, and a CPU generator cannot draw on it. Values are those of the CPU, bit for bit.

Its name is `ingotfake:0`: torch lets nobody call a device `cuda` that is none. What is not seen: kernels that CUDA
lacks, and numbers that differ there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend


class _Backend:
    """What torch asks the module of a backend: the device is there inside a `FakeDevice` block, and nowhere else.

    Test files are collected together, so the others compute on the CPU as they would without this one.
    """

    active = False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.active

    def device_count(self) -> int:
        return int(self.active)

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        del seed

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_BACKEND = _Backend()


class _Hook(_DummyPrivateUse1Hook):
    """The same answer from below."""

    def is_available(self) -> bool:
        return _BACKEND.active


_NAME = "ingotfake"
_setup_privateuseone_for_python_backend(_NAME, backend_module=_BACKEND, hook=_Hook())
DEVICE = torch.device(_NAME, 0)
_aten = torch.ops.aten
_CROSS = {_aten.copy_, _aten._to_copy, _aten.set_}
"""Operations whose purpose is to cross devices."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
"""Operations whose second argument, the indices, may be on the CPU."""


class FakeTensor(Tensor):
    """A tensor on `DEVICE`; its numbers are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[Self], inner: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    def tolist(self) -> Any:
        """Return the numbers as Python's own; torch does so for none of its subclasses."""
        return self.cpu().tolist()

    def __repr__(self, *_args: Any, **_kwargs: Any) -> str:
        return f"FakeTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}), None)


class FakeDevice(TorchDispatchMode):
    """Inside the block tensors can be made on `DEVICE` and moved there and back; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[tuple[int, ...]] = []
        """Shapes of tensors that were copied to the CPU."""
        self.syncs = 0
        """Numbers that the host waited for."""
        self._lifted = False

    def __enter__(self) -> Self:
        _BACKEND.active = True
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1, device=DEVICE)` is made on the CPU, then moved
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(kind, error, trace)
        _BACKEND.active = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}), self)


def host(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, on the CPU, without counting a copy."""
    return tensor.inner if isinstance(tensor, FakeTensor) else tensor


def _host(value: Any) -> Any:
    return value.inner if isinstance(value, FakeTensor) else value


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any], mode: FakeDevice | None) -> Any:  # noqa: C901
    packet = func.overloadpacket
    if packet is _aten._fused_sdp_choice:
        return 0  # plain operations: the fused kernels of the CPU are not those of the device
    there = any(isinstance(x, FakeTensor) for x in tree_iter((args, kwargs)))
    if there and packet not in _CROSS:
        _refuse_mixed(func, packet, args, kwargs)
    to_device = _goes_to_device(packet, args, kwargs, there=there)
    if to_device:
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{_NAME}' device type for generator but found 'cpu' ({func})")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")  # where the numbers are
    if mode is not None and there:
        mode.syncs += packet is _aten._local_scalar_dense
        if packet in _CROSS and not to_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            mode.to_host.append(tuple(args[1 if packet is _aten.copy_ else 0].shape))
    plain_args, plain_kwargs = tree_map(_host, (tuple(args), kwargs))
    result = func(*plain_args, **plain_kwargs)
    given = {id(plain): given for given, plain in zip(tree_iter(args), tree_iter(plain_args), strict=True)}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # changed in place
            return given[id(value)]
        return FakeTensor(value) if to_device else value

    return tree_map(place, result)


def _goes_to_device(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], *, there: bool) -> bool:
    """Return whether what an operation makes is on the device; `there` says whether something that it reads is."""
    if packet is _aten.copy_:
        return isinstance(args[0], FakeTensor)
    wanted = kwargs.get("device")
    return there if wanted is None else torch.device(wanted).type == _NAME


def _refuse_mixed(func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise where a CPU tensor with dimensions meets the device."""
    checked = (args[0], *args[2:]) if packet in _INDEXING and isinstance(args[0], FakeTensor) else args
    apart = [
        tuple(x.shape)
        for x in tree_iter((checked, kwargs))
        if isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.ndim > 0
    ]
    if apart:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({func}; on the CPU: {apart})"
        )
