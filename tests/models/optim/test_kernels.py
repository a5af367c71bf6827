"""The fused passes against float64 statements, and the compiled one: one kernel for all sizes, equal to the eager."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from models.optim import kernels
from models.optim.adamw import AdamW
from models.optim.lamb import Lamb
from models.optim.lars import Lars

# torch.compile imports parts of torch that warn of others.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

BETAS = (0.9, 0.999)
COMPILED = [
    (Lamb, {}),
    (Lamb, {"bias_correction": False, "max_grad_norm": 1.0}),
    (Lamb, {"bias_correction": "outside", "clamp": (0.5, 2.0)}),
    (Lars, {}),
    (Lars, {"form": "original", "momentum": 0.5}),
]


def arrays(count: int, size: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(size, generator=generator) * scale for _ in range(count)]


@pytest.mark.parametrize("step", [1, 100, math.inf])
@pytest.mark.parametrize("lr", [0.01, -1.0])
def test_adamw_is_its_formula_also_at_a_negative_rate_and_without_correction(step: float, lr: float) -> None:
    x, g, m, v = arrays(4, 1000)
    v.square_()
    wide = [array.double() for array in (x, g, m, v)]
    kernels.adamw_([x], [g], [[m], [v]], step=step, lr=lr, betas=BETAS, eps=1e-6, weight_decay=0.1)
    first, second = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    m64 = BETAS[0] * wide[2] + (1 - BETAS[0]) * wide[1]
    v64 = BETAS[1] * wide[3] + (1 - BETAS[1]) * wide[1] ** 2
    x64 = (1 - lr * 0.1) * wide[0] - lr * (m64 / first) / ((v64 / second).sqrt() + 1e-6)
    for array, expected in ((x, x64), (m, m64), (v, v64)):
        torch.testing.assert_close(array.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.9, 0.9), (0.9, 1 - 1e-5), (0.0, 0.5)])
def test_sgd_is_its_formula_and_keeps_a_tiny_undampened_share(momentum: float, dampening: float) -> None:
    x, g, m = arrays(3, 1000, 1e-3)
    m.mul_(1e-5)
    wide = [array.double() for array in (x, g, m)]
    kernels.sgd_([x], [g], [m], lr=1.0, momentum=momentum, dampening=dampening, weight_decay=0.1)
    moved = momentum * wide[2] + (1 - dampening) * (wide[1] + 0.1 * wide[0])
    torch.testing.assert_close(x.double(), wide[0] - moved, rtol=0, atol=1e-9)
    if momentum:
        torch.testing.assert_close(m.double(), moved, rtol=0, atol=1e-6 * float(moved.abs().max()))


@pytest.mark.parametrize("size", [1, 1000, kernels.DOT, 5 * kernels.DOT + 3])
def test_squares_are_accurate_to_5e_7(size: int) -> None:
    vector = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.5
    total = torch.stack(kernels.squares(vector)).double().sum()
    assert float(total) == pytest.approx(float(vector.double().square().sum()), rel=5e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_squares_tell_what_cannot_be_squared(bad: float) -> None:
    vector = torch.ones(2 * kernels.DOT)
    vector[kernels.DOT + 5] = bad
    assert [bool(torch.isfinite(part)) for part in kernels.squares(vector)] == [True, False]


@pytest.mark.parametrize(("length", "whole"), [(0, 0), (2047, 0), (2048, 2048), (5000, 4096)])
def test_a_compiled_kernel_gets_whole_rows_and_never_one_alone(length: int, whole: int) -> None:
    assert kernels.whole_rows(length) == whole


@pytest.mark.parametrize(("kind", "options"), COMPILED)
def test_compiled_and_eager_stay_within_6e_7_of_float64_over_20_steps(
    kind: Any, options: dict[str, Any], named: Any, fill: Any
) -> None:
    shapes = {"small": (5, 7), "rows": (64, 64), "more": (37, 83), "bias": (4096,)}
    eager, compiled, exact = named(**shapes), named(**shapes), named(**shapes)
    exact = {name: torch.nn.Parameter(parameter.detach().double()) for name, parameter in exact.items()}
    runs = [(eager, False), (compiled, True), (exact, False)]
    optimizers = [kind(each.items(), lr=0.02, weight_decay=0.1, compiled=flag, **options) for each, flag in runs]
    for step in range(20):
        fill(eager, step)
        for (parameters, _), optimizer in zip(runs, optimizers, strict=True):
            for name, parameter in parameters.items():
                parameter.grad = eager[name].grad.to(parameter.dtype)
            optimizer.step()
    assert optimizers[1].trust_ratios() == pytest.approx(optimizers[2].trust_ratios(), rel=1e-6)
    for name in shapes:
        largest = float(exact[name].detach().abs().max())
        for parameters in (eager, compiled):
            torch.testing.assert_close(parameters[name].double(), exact[name], rtol=0, atol=6e-7 * largest)


def test_torch_compile_makes_one_kernel_for_all_sizes_steps_rates_and_decays(monkeypatch: Any) -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("inductor")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counted, **options))
    kernels.compiled_sums.cache_clear()
    optimizer = Lamb([torch.nn.Parameter(torch.ones(2))])
    kernel = kernels.compiled_sums(optimizer.update)
    for rows, decay in ((4, 0.0), (2, 0.1), (1024, 0.1), (7, 0.0)):
        weights, gradient, first, second = arrays(4, rows * kernels.ROW)
        scalars = torch.tensor([0.1, 0.999, 0.001, 1.5, 2.0, 1e-6, decay])
        update = optimizer.update(weights, gradient, [first, second.abs()], scalars)
        expected = [float(vector.double().square().sum()) for vector in (gradient, update, weights)]
        assert kernel(weights, gradient, [first, second.abs()], scalars).tolist() == pytest.approx(expected, rel=1e-6)
    kernels.compiled_sums.cache_clear()
    assert counted.frame_count == 1


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: scalars read, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"compiled": True}])
@pytest.mark.parametrize("kind", [Lamb, Lars, AdamW])
def test_the_host_reads_no_more_for_40_tensors_than_for_one(
    kind: Any, options: dict[str, Any], named: Any, fill: Any
) -> None:
    if kind is AdamW and "compiled" in options:
        pytest.skip("AdamW has nothing to measure")
    reads = []
    for count in (1, 40):
        parameters = named(**{f"t{number}": (64, 40) for number in range(count)})
        optimizer = kind(parameters.items(), **options)
        fill(parameters, 0)
        optimizer.step()
        with HostReads() as mode:
            optimizer.step()
        reads.append(mode.count)
    assert reads[0] == reads[1]
    assert reads[0] <= 6


@pytest.mark.parametrize("kind", [Lamb, Lars])
@pytest.mark.parametrize(("clip", "expected"), [(None, 1), (0.5, 2)])
def test_all_norms_of_a_step_go_through_one_collective_or_two_with_clipping(
    kind: Any, clip: float | None, expected: int, named: Any, fill: Any
) -> None:
    parameters = named(**{f"t{number}": (8, 8) for number in range(12)})
    optimizer = kind(parameters.items(), max_grad_norm=clip)
    calls: list[tuple[int, ...]] = []
    layout = optimizer.layout
    reduce = lambda sums: calls.append(tuple(sums.shape)) or sums  # noqa: E731
    optimizer.bind(type(layout)(layout.fragments, layout.shapes, layout.partition_of, reduce=reduce))
    fill(parameters, 0)
    optimizer.step()
    assert calls == [(1, 12), (3, 12)][-expected:]
