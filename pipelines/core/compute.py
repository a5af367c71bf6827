"""How a run uses its machines: the `compute` section of a recipe, and the one place where a device is chosen.

Nothing here changes a result, except by rounding: CPU and GPU sum in different orders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator

from pipelines.core.errors import ConfigError
from pipelines.core.settings import NOT_IDENTITY, Settings

if TYPE_CHECKING:
    import torch


_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")
_UNITS_S = (86_400, 3_600, 60)


class Resources(Settings):
    """What one stage asks of a scheduler; what is left out is left to the section `compute`, then to the scheduler."""

    nodes: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Machines that the ranks of a stage are spread over, as many on each; a stage of one rank takes "
        "one. None: one.",
        json_schema_extra=NOT_IDENTITY,
    )
    gpus_per_node: int | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs to ask for on each node; none: one for each rank there where `device` is cuda, else none.",
        json_schema_extra=NOT_IDENTITY,
    )
    cpus: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Cores to ask for on each node, and threads of a stage that starts no ranks; none: one for each "
        "thread of each rank.",
        json_schema_extra=NOT_IDENTITY,
    )
    node_memory: float | None = Field(
        None,
        gt=0.0,
        description="Memory to ask for on each node, in GB (10^9 bytes); none: what the scheduler gives.",
        json_schema_extra=NOT_IDENTITY,
    )
    time: str | None = Field(
        None,
        examples=["4h", "1d12h", "90m"],
        description="Longest time of a job, as 90m, 4h or 1d12h: before it is over the stage saves, ends and is put in "
        "the queue again. None: what the scheduler gives.",
        json_schema_extra=NOT_IDENTITY,
    )
    partition: str | None = Field(
        None,
        pattern=r"^[\w.,+-]+$",
        description="Part of the cluster to run in, for kubernetes a queue of Kueue; none: the scheduler's default.",
        json_schema_extra=NOT_IDENTITY,
    )
    account: str | None = Field(
        None,
        pattern=r"^[\w.+-]+$",
        description="Account that is charged; none: your default.",
        json_schema_extra=NOT_IDENTITY,
    )
    container: str | None = Field(
        None,
        min_length=1,
        description="Image that a job runs in: for slurm a file or address that `apptainer exec` takes, for kubernetes "
        "one with the program, and the project in its working folder. None: the program as it is installed here.",
        json_schema_extra=NOT_IDENTITY,
    )

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value):
            raise ValueError("a time is written as days, hours and minutes, such as 90m, 4h or 1d12h")
        return value

    @property
    def asked(self) -> dict[str, int | float | str]:
        """What was asked for, by key."""
        values = {name: getattr(self, name) for name in Resources.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class ComputeConfig(Resources):
    """How a run uses its machines. Nothing here changes a result."""

    needs: ClassVar[Mapping[str, str]] = {"retry_delay_s": "retries"}

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where stages compute; auto takes the GPU if there is one.", json_schema_extra=NOT_IDENTITY
    )
    executor: str = Field(
        "local", description="What carries stages out: a module of flows/executors.", json_schema_extra=NOT_IDENTITY
    )
    parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Stages at work side by side where the graph allows it; more than one runs each in a process of "
        "its own. What measures latency always runs alone.",
        json_schema_extra=NOT_IDENTITY,
    )
    concurrency_limit: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Global concurrency limit on the Prefect server: a stage that computes waits for a slot for each "
        "of its ranks, so that runs which share machines do not meet. None: no waiting.",
        json_schema_extra=NOT_IDENTITY,
    )
    heartbeat_timeout_s: float = Field(
        600.0, gt=0, description="A rank silent for longer is taken for hung.", json_schema_extra=NOT_IDENTITY
    )
    grace_s: float = Field(
        30.0, gt=0, description="Time to save state between SIGTERM and SIGKILL.", json_schema_extra=NOT_IDENTITY
    )
    retries: int = Field(
        2, ge=0, le=100, description="Retries of a stage after a transient fault.", json_schema_extra=NOT_IDENTITY
    )
    memory: float | None = Field(
        None,
        gt=0.0,
        description="Memory that a rank may take on its device, in GB (10^9 bytes), for plans; none: what this machine "
        "has.",
        json_schema_extra=NOT_IDENTITY,
    )
    peak_tflops: float | None = Field(
        None,
        gt=0.0,
        description="Peak arithmetic of a rank in TFLOP/s, for plans; none: what earlier runs have measured, else an "
        "assumption that the plan names.",
        json_schema_extra=NOT_IDENTITY,
    )
    price_per_hour: float | None = Field(
        None,
        ge=0.0,
        description="Price of one rank for one hour, in any currency (of a GPU, as clouds state it); none: plans show "
        "no cost.",
        json_schema_extra=NOT_IDENTITY,
    )
    retry_delay_s: float = Field(
        5.0, ge=0, description="First delay between retries; doubles each time.", json_schema_extra=NOT_IDENTITY
    )
    node_timeout_s: float = Field(
        30.0,
        ge=2.0,
        description="A node of a stage on several that has not been heard of for longer is taken for lost.",
        json_schema_extra=NOT_IDENTITY,
    )
    stages: dict[str, Resources] = Field(
        default_factory=dict,
        description="What single stages ask for in place of what stands above: `stages.pretrain.nodes = 4`.",
        json_schema_extra=NOT_IDENTITY,
    )

    def at(self, stage: str, *, ranks: int, cores: int) -> Self:
        """Return the section as one stage sees it: what the stage asks for in place of what all do, and no table.

        Args:
            stage: its name.
            ranks: processes that it spreads over nodes; a stage of one takes one node.
            cores: cores that all of them can use.
        """
        own = self.stages[stage].asked if stage in self.stages else {}
        table = {key: getattr(self, key) for key in self.model_fields_set} | own | {"stages": {}}
        nodes = table["nodes"] = (table.get("nodes") or 1) if ranks > 1 else 1
        if table.get("cpus") is None and cores > 1:
            table["cpus"] = -(-cores // nodes)
        if table.get("gpus_per_node") is None and self.device == "cuda":
            table["gpus_per_node"] = -(-ranks // nodes)
        return type(self).model_validate(table)

    @property
    def node_count(self) -> int:
        """Machines that the ranks of a stage are spread over."""
        return self.nodes or 1


def seconds_of(time: str) -> int:
    """Return the seconds of a time such as 90m, 4h or 1d12h; 0 for what is none."""
    parts = _TIME.fullmatch(time)
    return sum(int(n) * unit for n, unit in zip(parts.groups("0"), _UNITS_S, strict=True)) if parts else 0


def resolve_device(wanted: str, *, ranks: int = 1) -> Literal["cpu", "cuda"]:
    """Return the kind of device that `compute.device` means on this machine.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        ranks: processes on this machine that need a GPU each, where GPUs are used.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    gpus = torch.cuda.device_count()
    if wanted == "auto" and gpus == 0:
        return "cpu"
    if gpus < ranks:
        raise ConfigError(
            f"compute.device = {wanted}: {gpus} GPUs for {ranks} {'rank' if ranks == 1 else 'ranks'}",
            hint=f"set the world_size to at most {gpus}, or compute.device to cpu" if gpus else "compute.device=cpu",
        )
    return "cuda"


def torch_device(compute: ComputeConfig) -> torch.device:
    """Return the device for the tensors of a stage that computes in one process."""
    import torch

    return torch.device(resolve_device(compute.device))
