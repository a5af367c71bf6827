"""How a run uses its machine: the `compute` section of a recipe, and the one place where a device is chosen.

Nothing here changes a result, except by rounding: CPU and GPU sum in different orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipelines.core.errors import ConfigError
from pipelines.core.settings import NOT_IDENTITY, Settings

if TYPE_CHECKING:
    import torch


class ComputeConfig(Settings):
    """How a run uses its machine. Nothing here changes a result."""

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


def resolve_device(wanted: str, *, ranks: int = 1) -> Literal["cpu", "cuda"]:
    """Return the kind of device that `compute.device` means on this machine.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        ranks: processes that need a GPU each, where GPUs are used.

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
