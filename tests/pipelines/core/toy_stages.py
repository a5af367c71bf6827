"""A table with one stage that needs nothing: it writes a text, and fails, waits or meets others when told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.core import errors
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IngotError
from pipelines.core.fingerprint import digest
from pipelines.core.request import StageRequest
from pipelines.core.settings import NOT_IDENTITY, Settings
from pipelines.core.stage import Progress, Stage, StageContext, Summary

TABLE = "tests.pipelines.core.toy_stages:STAGES"
DEADLINE_S = 60.0


class Config(Settings):
    text: str = Field("hello", description="What the stage writes.")
    fail: str = Field("", description="Error class to raise, or SIGKILL.", json_schema_extra=NOT_IDENTITY)
    meet: str = Field("", description="Folder in which two stages wait for each other.", json_schema_extra=NOT_IDENTITY)
    journal: str = Field(
        "", description="File that is told when the stage begins and ends.", json_schema_extra=NOT_IDENTITY
    )
    work_s: float = Field(0.0, description="How long it takes.", json_schema_extra=NOT_IDENTITY)
    sleep: bool = Field(False, description="Work until it is stopped.", json_schema_extra=NOT_IDENTITY)


def run(config: Config, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> Summary:
    print("what a library prints")
    _note(config, "+")
    (context.scratch / "progress").write_text("half way")
    context.report(Progress(context.node, 1, 2, "letters", "half", {"loss": 0.5}))
    if config.fail == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.fail:
        error: type[IngotError] = getattr(errors, config.fail)
        raise error("it failed", hint="do this")
    time.sleep(config.work_s)
    until = time.monotonic() + DEADLINE_S
    if config.meet:
        (Path(config.meet) / config.text).touch()
    while config.sleep or (config.meet and len(list(Path(config.meet).iterdir())) < 2):
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.01)
    read = "".join((used.path / "out.txt").read_text() for used in inputs.values())
    (out_dir / "out.txt").write_text(read + config.text)
    _note(config, "-")
    return {"letters": len(config.text)}


def _note(config: Config, what: str) -> None:
    if config.journal:
        with Path(config.journal).open("a") as journal:
            journal.write(f"{what}{config.text}\n")


STAGES = {"toy": Stage("toy", version=1, entry="tests.pipelines.core.toy_stages:run", settings=f"{__name__}:Config")}


def request(store: Path, **options: Any) -> StageRequest:
    """A request for the toy; options of the request, all others go to its configuration."""
    fields = {name: options.pop(name) for name in list(options) if name in StageRequest.model_fields}
    inputs = fields.get("inputs", {})
    keys = {name: used.fingerprint for name, used in inputs.items()}
    planned = digest(STAGES["toy"].identity(Config(**options), keys))
    table = {"stage": "toy", "node": "toy.a", "fingerprint": planned, "configuration": options, "inputs": inputs}
    table |= {"data_hash": None, "store": str(store), "stages": TABLE}
    return StageRequest.model_validate(table | fields)
