"""What the execution of a stage will take, told from its configuration: memory, time, arithmetic, disk.

A stage names its estimator in `pipelines/stages.py`: a pure function `(config, EstimateContext) -> Estimate` that
imports no torch. Stages do not know each other's configuration, so an estimate also has the facts that the stages below
need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.core.machine import Machine

Source = Literal["measured", "scaled", "stated"]
"""Where a time comes from. measured: an earlier run of the same shape; scaled: an earlier run of another shape on this
machine, by the work of the two; stated: rates that this checkout, or `compute.peak_tflops`, states."""

_GIGA = 1e9
_SHOWN = 4
_SAME_WORK = 0.01
"""Relative difference of work below which two executions count as of the same shape."""


@dataclass(frozen=True)
class Time:
    """A duration, and how it is known."""

    seconds: float
    source: Source
    basis: str
    """What it follows from, in words."""


@dataclass(frozen=True)
class Needs:
    """The memory that the ranks of a stage take, in bytes."""

    ranks: int = 1
    """Processes that compute side by side."""
    rank_bytes: int = 0
    """What each holds on its device at the peak."""
    first_bytes: int = 0
    """What the first one holds beyond that."""
    host_bytes: int = 0
    """What each holds in the CPU's memory beside a GPU."""

    def fit(self, machine: Machine) -> bool:
        """Tell whether a machine holds it; what is not known of the machine is no obstacle."""
        return self.fits_device(machine) and (
            machine.host_bytes is None or self.ranks * self.host_bytes <= machine.host_bytes
        )

    def fits_device(self, machine: Machine) -> bool:
        """Tell whether the devices hold it: the memory of a machine's CPU, which ranks share, or a GPU for each."""
        together = self.ranks if machine.shared else 1
        needed = together * self.rank_bytes + self.first_bytes
        return machine.memory_bytes is None or needed <= machine.memory_bytes

    def told(self, machine: Machine) -> str:
        """Return the memory of the devices in words."""
        if machine.shared and self.ranks > 1:
            more = f" and {gigabytes(self.first_bytes)}" if self.first_bytes else ""
            return f"{self.ranks} ranks of {gigabytes(self.rank_bytes)}{more}"
        return gigabytes(self.rank_bytes + self.first_bytes)


@dataclass(frozen=True)
class Remedy:
    """Settings under which a stage takes less memory."""

    settings: tuple[str, ...]
    """`dotted.path=value`, as the command line takes them."""
    needs: Needs


@dataclass(frozen=True)
class Estimate:
    """What an execution of a stage will take. Memory, arithmetic and disk in bytes and operations, time in seconds."""

    ranks: int = 1
    """Processes that compute side by side."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes that a rank holds on its device at the peak, by what they are for."""
    first_bytes: int = 0
    """Bytes that the first rank holds beyond that."""
    host_memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes that a rank holds in the CPU's memory, where the device is a GPU; empty where they are not known."""
    time: Time | None = None
    """None where nothing is known of it."""
    flops: float | None = None
    """Floating point operations of all ranks together."""
    disk: Mapping[str, int] = field(default_factory=dict)
    """Bytes that it writes, by what they are for: its artifact, and what it keeps until that is there."""
    disk_exact: bool = False
    """Whether those bytes follow from the configuration; else they rest on assumptions of the text."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the stages below need to know: tokens, vocabulary, parameters."""
    remedies: Sequence[Remedy] = ()
    """Settings that take less memory, the mildest first."""

    @property
    def needs(self) -> Needs:
        """The memory of all ranks."""
        return Needs(self.ranks, sum(self.memory.values()), self.first_bytes, sum(self.host_memory.values()))

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the rank that holds most, on its device; None where they are not known."""
        return self.needs.rank_bytes + self.first_bytes if self.memory else None

    @property
    def disk_bytes(self) -> int | None:
        """Bytes written in all; None where they are not known."""
        return sum(self.disk.values()) if self.disk else None

    def cost(self, price_per_hour: float | None) -> float | None:
        """Return what it costs at a price of one rank for one hour, in the unit of the price."""
        if price_per_hour is None or self.time is None:
            return None
        return self.time.seconds / 3600 * self.ranks * price_per_hour

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "ranks": self.ranks,
            "memory_bytes": self.memory_bytes,
            "memory": dict(self.memory),
            "first_bytes": self.first_bytes,
            "host_memory": dict(self.host_memory),
            "seconds": self.time and self.time.seconds,
            "source": self.time and self.time.source,
            "basis": self.time and self.time.basis,
            "flops": self.flops,
            "disk": dict(self.disk),
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class EstimateContext:
    """What an estimator may know besides the configuration."""

    machine: Machine
    inputs: Mapping[str, Estimate] = field(default_factory=dict)
    """Input name -> estimate of the stage that makes it."""
    made: Artifact | None = None
    """The artifact itself, where it exists."""
    history: Sequence[Artifact] = ()
    """Earlier artifacts of the stage, the closest first."""
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """Everything in the store, by fingerprint."""
    corpus: str | None = None
    """DVC hash of the corpus."""
    corpus_bytes: int | None = None
    """Size of the corpus as DVC tracks it."""

    def fact(self, name: str, default: Any = None) -> Any:
        """Return a fact of the first input that knows it."""
        return next((made.facts[name] for made in self.inputs.values() if name in made.facts), default)

    def number_behind(self, found: Artifact, name: str) -> float | None:
        """Return a number of the summary of an artifact, or of what it was made of; None where nobody has it."""
        value = found.manifest.summary.get(name)
        if isinstance(value, int | float):
            return value
        sources = (self.artifacts.get(str(key)) for key in found.manifest.identity["inputs"].values())
        behind = (self.number_behind(source, name) for source in sources if source is not None)
        return next((value for value in behind if value is not None), None)

    def closest_duration(self) -> Time | None:
        """Return what the closest earlier execution took, None where there was none."""
        return self.scaled_duration(1.0, lambda _earlier: 1.0)

    def scaled_duration(self, work: float, work_of: Callable[[Artifact], float | None]) -> Time | None:
        """Return what the closest earlier execution took, scaled by the work of the two; None where there is none.

        Args:
            work: of this execution, in any unit.
            work_of: gives the work of an earlier artifact in the same unit, None where it is not known.
        """
        for earlier in self.history:
            took, before = earlier.manifest.provenance, work_of(earlier)
            if took is None or not before:
                continue
            what = f"{earlier.manifest.node} {earlier.manifest.fingerprint[:8]} took {took.duration_s:.0f} s"
            if abs(work / before - 1.0) < _SAME_WORK:
                return Time(took.duration_s, "measured", what)
            return Time(took.duration_s * work / before, "scaled", f"{what} for {before / work:.3g} of the work")
        return None


def refuse_what_does_not_fit(node: str, estimate: Estimate, machine: Machine) -> None:
    """Refuse a stage whose ranks cannot hold what they need in the memory that there is.

    Raises:
        ConfigError: naming what is needed, what there is, and settings that would fit, with what they would need.
    """
    needs = estimate.needs
    if needs.fit(machine):
        return
    if needs.fits_device(machine):
        parts, there = estimate.host_memory, f"there are {gigabytes(machine.host_bytes or 0)}"
        needed = f"{needs.ranks} ranks of {gigabytes(needs.host_bytes)} are needed of the CPU's memory"
    else:
        parts, there = estimate.memory, f"{machine.memory_name} {gigabytes(machine.memory_bytes or 0)}"
        needed = f"{needs.told(machine)} are needed"
    largest = sorted(parts.items(), key=lambda part: -part[1])[:_SHOWN]
    most = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest)
    fitting = [remedy for remedy in estimate.remedies if remedy.needs.fit(machine)][:_SHOWN]
    hints = "; or ".join(f"{' '.join(remedy.settings)} ({remedy.needs.told(machine)})" for remedy in fitting)
    raise ConfigError(
        f"{node} cannot fit: {needed} ({most}), {there}",
        hint=f"it would fit with {hints}"
        if hints
        else "no setting makes it fit here; `--world-size N` plans for a machine that is not this one",
    )


def gigabytes(count: float) -> str:
    """Return bytes in GB (10^9), three digits."""
    return f"{count / _GIGA:.3g} GB" if count < 1000 * _GIGA else f"{count / _GIGA:,.0f} GB"
