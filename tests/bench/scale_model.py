"""Where the design breaks first: a training of 8 to 16,384 ranks that meets faults, simulated event by event.

    python tests/bench/scale_model.py [--days 30] [--seed 0] [--picture docs/pictures/scale.svg]

Rates of faults are published ones, seconds are those measured on this code, and what is assumed is called so. The
simulated training is ours: a synchronous step, a save in the background at Young's and Daly's interval, and after any
fault a restart of all ranks, who meet anew and read the newest checkpoint.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import simpy

from pipelines.training import checkpoint_interval

DAY_S = 86400.0
RANKS = tuple(2**power for power in range(3, 15))
LLAMA_3 = 419 / 54 / 16384
"""Unexpected interruptions of a GPU a day: 419 in 54 days on 16,384 (arXiv 2407.21783, section 3.3.4)."""
HANGS = 5948 / 44184
"""Share of faults that say nothing: 5,948 implicit ones beside 38,236 explicit (ByteRobust, arXiv 2509.16293)."""
PUBLISHED = {"Llama 3: above 90 %": (16384, 0.90), "ByteRobust: 97 %": (9600, 0.97)}


@dataclass(frozen=True)
class Design:
    """What each part of a training takes, in seconds unless the name says otherwise."""

    faults_per_rank_day: float = LLAMA_3
    hangs: float = HANGS
    step: float = 5.9
    """Assumed: Llama 3's 16 M tokens, 405 B parameters, 400 TFLOP/s a GPU at 16,384; the same for every size."""
    save: float = 0.3
    """A save keeps the training waiting for the copy of 300 MB, assumed at 1 GB/s."""
    detect: float = 0.1
    """The launcher looks 20 times a second."""
    heartbeat: float = 600.0
    """`compute.heartbeat_timeout_s`: when a silent rank is taken for hung."""
    start: float = 20.0
    """Assumed: processes, imports and the first step, whatever the size."""
    read: float = 1.0
    """Each rank hashes and reads its share of the checkpoint: 300 MB at the same rate, three times."""
    question: float = 34e-6
    """Measured: processor time of the store (torch's TCPStore, one thread) for one question."""
    questions: float = 2.0
    """Counted: what each rank asks about each rank while gloo connects all with all."""
    address_bytes: float = 10.4
    """Counted: bytes of an answer for each rank, beside 116."""
    bandwidth: float = 1.25e9
    """Assumed: bytes a second out of the host of the store, 10 Gbit/s."""
    agree: float = 2.5e-4
    """Measured: processor time of one sum over hosts, as each step makes it."""
    hop: float = 22e-6
    """A hop of its ring: 2 us measured, 20 us assumed for the network; 2 x (ranks - 1) of them."""
    files: int = 1 << 20
    """File descriptors that a process may have; Linux gives 1,024 where nobody asks for more."""
    connects_all: bool = True
    """Whether every rank is connected with every other on the host, as gloo does it."""

    def meeting(self, ranks: int) -> float:
        """Return the seconds until all ranks have found each other: the store serves, or its network is full."""
        if not self.connects_all:
            return ranks * self.question * self.questions
        asked = ranks**2 * self.questions
        return max(asked * self.question, ranks**2 * (116 + self.address_bytes * ranks) / self.bandwidth)

    def agreeing(self, ranks: int) -> float:
        """Return the seconds of a step in which the ranks agree on a few numbers."""
        hops = 2 * (ranks - 1) if self.connects_all else 2 * math.ceil(math.log2(max(ranks, 2)))
        return self.agree + hops * self.hop

    def restart(self, ranks: int) -> float:
        """Return the seconds from the end of all ranks to the first new step."""
        return self.start + self.read + self.meeting(ranks)

    def can_start(self, ranks: int) -> bool:
        """Return whether a process may have as many connections as it needs: ranks + 3 were counted."""
        return not self.connects_all or ranks + 3 <= self.files

    def interval(self, ranks: int) -> float:
        """Return the seconds of work between saves."""
        return checkpoint_interval.seconds(self.save, self.between_faults(ranks))

    def between_faults(self, ranks: int) -> float:
        """Return the mean seconds between faults of all ranks together."""
        return DAY_S / (self.faults_per_rank_day * ranks)


TODAY = Design()
TREE = replace(TODAY, connects_all=False)
"""What it would be if hosts agreed along a tree."""
DEFAULT_LIMIT = replace(TODAY, files=1024)


class Training:
    """One simulated training.

    Args:
        design: seconds of its parts.
        ranks: how many.
        seed: of the faults.
    """

    def __init__(self, design: Design, ranks: int, seed: int) -> None:
        self._design, self._ranks = design, ranks
        self._draw = random.Random(f"{seed}/{ranks}")
        self.useful = 0.0
        """Seconds of steps that were saved, without agreeing."""
        self.faults = 0
        self._env = simpy.Environment()
        self._process = self._env.process(self._train())
        self._env.process(self._break())

    def run(self, seconds: float) -> float:
        """Return the effective training time ratio of so many seconds."""
        self._env.run(until=seconds)
        return self.useful / seconds

    def _break(self) -> Iterator[simpy.Event]:
        while True:
            yield self._env.timeout(self._draw.expovariate(1.0 / self._design.between_faults(self._ranks)))
            self.faults += 1
            self._process.interrupt()

    def _train(self) -> Iterator[simpy.Event]:
        design, ranks = self._design, self._ranks
        work = design.interval(ranks)
        share = design.step / (design.step + design.agreeing(ranks))
        down = design.restart(ranks)
        while True:
            try:
                if down:
                    yield self._env.timeout(down)
                    down = 0.0
                yield self._env.timeout(work + design.save)
                self.useful += work * share
            except simpy.Interrupt:
                hung = self._draw.random() < design.hangs
                down = (design.heartbeat if hung and not down else design.detect) + design.restart(ranks)


def analytic(design: Design, ranks: int) -> float:
    """Return the ratio to first order: a save an interval; for each fault half an interval, finding it, a restart."""
    work, between = design.interval(ranks), design.between_faults(ranks)
    find = (1 - design.hangs) * design.detect + design.hangs * design.heartbeat
    share = design.step / (design.step + design.agreeing(ranks))
    return share / (1 + design.save / work + (work / 2 + find + design.restart(ranks)) / between)


def ratio(design: Design, ranks: int, *, days: float, seed: int) -> float:
    """Return the simulated ratio; 0 where the ranks cannot even meet."""
    return Training(design, ranks, seed).run(days * DAY_S) if design.can_start(ranks) else 0.0


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """Draw the ratios over the number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ingot"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, values in rows.items():
        axes.plot(RANKS, values, marker="o", markersize=3, label=name)
    for name, (ranks, value) in PUBLISHED.items():
        axes.plot([ranks], [value], marker="*", markersize=11, linestyle="none", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS], rotation=45)
    axes.set_xlabel("ranks")
    axes.set_ylabel("effective training time ratio")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    """Simulate, print the table, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args(arguments)
    quick = replace(TREE, heartbeat=60.0)
    designs = {
        "as it is": TODAY,
        "1,024 files a process (Linux's default)": DEFAULT_LIMIT,
        "hosts agree along a tree": TREE,
        "and a heartbeat of 60 s": quick,
    }
    rows = {
        name: [ratio(each, ranks, days=asked.days, seed=asked.seed) for ranks in RANKS]
        for name, each in designs.items()
    }
    print("| ranks | faults a day | restart s | agreeing ms a step | " + " | ".join(designs) + " | first order |")
    print("|---|---|---|---|" + "---|" * (len(designs) + 1))
    for place, ranks in enumerate(RANKS):
        parts = [f"{DAY_S / TODAY.between_faults(ranks):.2f}", f"{TODAY.restart(ranks):,.0f}"]
        parts += [f"{1000 * TODAY.agreeing(ranks):.1f}", *(f"{rows[name][place]:.3f}" for name in designs)]
        print(f"| {ranks:,} | " + " | ".join([*parts, f"{analytic(TODAY, ranks):.3f}"]) + " |")
    if asked.picture:
        draw(rows, asked.picture)


if __name__ == "__main__":
    main()
