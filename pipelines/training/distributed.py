"""The ranks of a run: who this one is, and the few numbers that all of them must agree on."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Taken from the process group itself, never from a wrapper's idea of it."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """Return the place of this process: in the default process group, or alone."""
        if not distributed.is_initialized():
            return cls(0, 1, device)
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks of numbers that the host has, in float64; equal on every rank.

        They go from host to host, also where the ranks train on GPUs: nothing waits for a device.
        """
        totals = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            distributed.all_reduce(totals, group=_host_group())
        return totals.tolist()

    def gathered(self, value: float) -> list[float]:
        """Return the value of every rank, in rank order; equal on every rank."""
        own = [0.0] * self.world
        own[self.rank] = value
        return self.summed(own)

    def gathered_rows(self, own_S: Tensor) -> list[list[float]]:
        """Return a vector of every rank [length][world], equal on every rank; reads the device once."""
        rows_SW = torch.zeros(len(own_S), self.world, dtype=torch.float64)
        rows_SW[:, self.rank] = own_S.double().cpu()
        if self.world > 1:
            distributed.all_reduce(rows_SW, group=_host_group())
        return rows_SW.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.summed([0.0])


@functools.cache
def meet() -> Any:
    """Have the ranks meet at a store that only their machines can reach; called before the process group is made.

    The store that torch opens by itself listens on every interface of the machine, and lets whoever connects read and
    write it. Rank 0 opens it here instead, at the address that the launcher gave, and all ranks are its clients: on
    one machine the loopback, on several the address by which the other nodes reach the first.

    Returns:
        The store on rank 0, alive as long as the process; None elsewhere, and where the launcher gave no address.

    Raises:
        OSError: another process has taken the port; the launcher then tries another one.
    """
    address = os.environ.get("MASTER_ADDR")
    if distributed.is_initialized() or address is None:
        return None
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)  # torch's way to say that the store is there already
    if os.environ["RANK"] != "0":
        return None
    port = int(os.environ["MASTER_PORT"])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    backlog = int(os.environ["WORLD_SIZE"]) + 128
    listener = socket.create_server((address, port), family=family, backlog=backlog)
    return distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _host_group() -> Any:
    """Return the process group for numbers on the host: the default one (None), or one of gloo beside NCCL's."""
    return None if "gloo" in distributed.get_backend() else _gloo_group()


@functools.cache
def _gloo_group() -> Any:
    """Make the group, once; a collective call."""
    return distributed.new_group(backend="gloo")
