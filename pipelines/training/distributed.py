"""The ranks of a run: who this one is, and the few numbers that all of them must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed


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
        """Return the sums over all ranks, in float64; equal on every rank."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            distributed.all_reduce(totals)
        return totals.tolist()

    def gathered(self, value: float) -> list[float]:
        """Return the value of every rank, in rank order; equal on every rank."""
        own = [0.0] * self.world
        own[self.rank] = value
        return self.summed(own)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.summed([0.0])
