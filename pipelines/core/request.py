"""A stage execution as a value: everything that any process needs to execute one node of a run.

A request is JSON. This process, a child process, or another machine with the same program, project and store executes
it alike (`python -m pipelines.core.run_stage REQUEST.json`), because no Python object crosses the line.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.core.compute import ComputeConfig
from pipelines.core.stage import Stage, TrackingTarget, imported


class ArtifactRef(BaseModel):
    """An artifact in the store of the request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    fingerprint: str


class StageRequest(BaseModel):
    """One node of a run, to be executed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    node: str
    fingerprint: str
    """Identity that the plan has for the node: a checkout that would make something else refuses the request."""
    configuration: dict[str, Any]
    """Settings of the stage as the recipe gives them; defaults are left to the checkout, which `fingerprint` checks."""
    inputs: dict[str, ArtifactRef]
    """Input name -> artifact."""
    data_hash: str | None
    """DVC hash of the corpus that the artifact is made or descends from; None for neither."""
    store: str
    """Address of the store: the absolute path of its folder, or `s3://BUCKET/PREFIX`."""
    project: str | None = None
    """The user's project, an absolute path; None: the one around the working directory of whoever executes this."""
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingTarget = TrackingTarget()
    """Its URI may hold a password: hand requests over by standard input, or by files that others cannot read."""
    force: bool = False
    """Run the body even when the store has the artifact."""
    alone: bool = False
    """Whether the stage measures time, so that nothing else may work on its machine meanwhile."""
    wait_s: float | None = None
    """How long to wait for another run that builds the same artifact; None waits for ever."""
    stages: str = "pipelines.stages:STAGES"
    """`module:attribute` of the table that describes the stage."""

    def described(self) -> Stage:
        """Return the description of the stage."""
        stage: Stage = imported(self.stages)[self.stage]
        return stage

    def input_keys(self) -> dict[str, str]:
        """Return input name -> fingerprint, and the corpus by its hash where the stage reads it."""
        keys = {name: used.fingerprint for name, used in self.inputs.items()}
        if self.described().corpus == "reads":
            assert self.data_hash is not None
            keys["data"] = self.data_hash
        return keys
