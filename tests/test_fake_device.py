"""The fake device refuses what CUDA refuses, allows what CUDA allows, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fake_device import DEVICE, FakeDevice, host

X = torch.arange(6.0)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(6),
        lambda x: torch.stack([x, torch.ones(6)]),
        lambda x: torch.ones(6)[x.long()],
        lambda x: x.index_copy(0, torch.arange(6), x),
        lambda x: torch.bucketize(x, torch.arange(6.0)),
        lambda x: torch.equal(x, torch.ones(6)),
        nn.Linear(6, 2),
        lambda x: x.masked_fill_(torch.ones(6, dtype=torch.bool), 0.0),
        lambda x: torch.rand(6, generator=torch.Generator(), device=x.device),
    ],
)
def test_what_meets_both_devices_is_refused(mixed: Callable[[Tensor], Tensor]) -> None:
    with FakeDevice(), pytest.raises(RuntimeError, match=r"same device|generator"):
        mixed(X.to(DEVICE))


@pytest.mark.parametrize(
    "fine",
    [
        lambda x: x + torch.tensor(2.0),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: x[torch.ones(6, dtype=torch.bool)],
        lambda x: torch.where(x > 2, x, torch.tensor(0.0)),
        lambda x: torch.zeros_like(x).copy_(torch.ones(6)),
        lambda x: x + torch.ones(6).to(x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device).repeat(2),
        lambda x: torch.rand(6, generator=torch.Generator().manual_seed(0)).to(x.device),
    ],
)
def test_what_cuda_allows_computes_what_the_cpu_computes(fine: Callable[[Tensor], Tensor]) -> None:
    with FakeDevice():
        result = fine(X.clone().to(DEVICE))
    assert result.device == DEVICE
    assert torch.equal(host(result), fine(X.clone()))


def test_copies_and_reads_are_counted() -> None:
    with FakeDevice() as fake:
        x = X.to(DEVICE)
        assert fake.to_host == []
        assert float(x.sum()) == 15.0
        assert x.view(2, 3).cpu().shape == (2, 3)
        assert not bool(x[0])
    assert fake.to_host == [(2, 3)]
    assert fake.syncs == 2


def test_a_module_trains_on_it_as_on_the_cpu() -> None:
    def trained(device: torch.device) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(6, 3).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(X.to(device)).square().sum().backward()
            optimizer.step()
        assert layer.weight.device == device
        return layer.weight.detach()

    with FakeDevice():
        result = trained(DEVICE)
    assert torch.equal(host(result), trained(torch.device("cpu")))


def test_the_rest_of_the_process_sees_no_accelerator() -> None:
    """Test files are collected together: what this one registers must change nothing for the others."""
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    weight = torch.ones(3, requires_grad=True)
    checkpoint(lambda w: (w * w).sum(), weight, use_reentrant=False).backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
