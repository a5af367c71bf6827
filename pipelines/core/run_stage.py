"""Run one stage: cache, lease, body, publication. The wrapper that every stage shares.

    python -m pipelines.core.run_stage REQUEST.json      (`-`: the request comes from standard input)

executes one `StageRequest` from any working directory. Standard output carries JSON lines and nothing else:

    {"event": "progress", "done": 3, "total": 40, "unit": "steps", "message": "...", "metrics": {...}}
    {"event": "artifact", "path": "...", "fingerprint": "...", "digest": "..."}        last, after success
    {"event": "error", "kind": "DiskFullError", "message": "...", "hint": "..."}       last, after a known failure

Exit codes are those of `errors.py`. SIGTERM and SIGINT stop the stage, which keeps what it needs to go on (code 75).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import boundary, disk, environment, fingerprint, progress_bars, provenance, stop
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError, IngotError
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.settings import Settings
from pipelines.core.stage import Progress, Stage, StageContext
from pipelines.core.store import Store, open_store


def execute(request: StageRequest, report: Callable[[Progress], None] = lambda _progress: None) -> Artifact:
    """Return the artifact that a request asks for, running the stage only when the store does not have it.

    Args:
        request: what to execute.
        report: receives the progress of the stage.

    Raises:
        ConfigError: this checkout would make something else than what was planned.
        IngotError: an input is not in the store; everything that `materialize` and the stage raise.
    """
    environment.clear()
    stage, store = request.described(), open_store(request.store)
    config, keys = stage.configured(request.configuration), request.input_keys()
    if (mine := fingerprint.digest(stage.identity(config, keys))) != request.fingerprint:
        raise ConfigError(
            f"{request.node} was planned as {request.fingerprint[:12]}, this checkout would make {mine[:12]}",
            hint="plan and execute with the same commit",
        )
    context = StageContext(
        node=request.node,
        scratch=store.root,
        report=report,
        compute=request.compute,
        tracking=request.tracking,
        store=store.root,
        project=None if request.project is None else Path(request.project),
    )
    return materialize(
        stage,
        config,
        {name: _stored(store, name, used) for name, used in request.inputs.items()},
        store,
        context,
        input_keys=keys,
        data_hash=request.data_hash,
        force=request.force,
        wait_s=request.wait_s,
    )


def _stored(store: Store, name: str, wanted: ArtifactRef) -> Artifact:
    stored = store.find(wanted.stage, wanted.fingerprint)
    if stored is None:
        raise IngotError(
            f"the input {name} ({wanted.stage} {wanted.fingerprint[:12]}) is not in {store.address}",
            hint="run without --only, or run that stage first",
        )
    return stored


def materialize(
    stage: Stage,
    config: Settings,
    inputs: Mapping[str, Artifact],
    store: Store,
    context: StageContext,
    *,
    input_keys: Mapping[str, str],
    data_hash: str | None,
    force: bool = False,
    wait_s: float | None = None,
) -> Artifact:
    """Return the artifact of this stage, running its body only when the store does not have it.

    Args:
        stage: what to run.
        config: its configuration section.
        inputs: input name -> artifact; each is verified before the body reads it.
        store: where to look and publish.
        context: reporting and compute settings; its scratch folder is set here.
        input_keys: input name -> fingerprint (or data hash): the identity of the inputs.
        data_hash: DVC hash of the corpus, for provenance.
        force: run the body even when the artifact exists.
        wait_s: how long to wait for another run that builds it; None waits for ever.

    Raises:
        LockedError: another run held the lease for longer than `wait_s`.
        IntegrityError: an input does not match its manifest.
        DiskFullError: nothing of the artifact is left, its checkpoints are.
    """
    identity = stage.identity(config, input_keys)
    key = fingerprint.digest(identity)
    if not force and (cached := store.find(stage.name, key)):
        return cached
    resume_key = fingerprint.digest(stage.resume_key(config, input_keys))
    used_keys = [used.manifest.fingerprint for used in inputs.values()]
    with store.lease(stage.name, resume_key, wait_s=wait_s, inputs=used_keys) as lease:
        # Another run may have published it while this one waited for the lease.
        if not force and (cached := store.find(stage.name, key)):
            return cached
        for used in inputs.values():
            store.verify(used)
        build = store.build_folder(stage.name, resume_key)
        started = time.monotonic()
        with (
            disk.explained(f"the artifact of {context.node}", build, remove=True),
            progress_bars.bars(),
            store.attempt(stage.name, resume_key, lease, stage.journals) as scratch,
        ):
            at_work = dataclasses.replace(context, scratch=scratch, store=store.root)
            summary = stage.body()(config, inputs, build, at_work)
            made_by = provenance.capture(
                duration_s=time.monotonic() - started, source_digest=stage.source_digest(), data_hash=data_hash
            )
            published = store.publish(
                build,
                stage.name,
                key,
                lease,
                node=context.node,
                identity=identity,
                parents={name: used.digest for name, used in inputs.items()},
                summary=summary,
                provenance=made_by,
                observations=stage.observations,
            )
        store.clear_scratch(stage.name, resume_key)
        return published


def main(arguments: list[str]) -> int:
    """Execute the request in a file, or on standard input; return the exit code."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error

    def tell(event: str, **facts: Any) -> None:
        lines.write(json.dumps({"event": event, **facts}) + "\n")

    def report(progress: Progress) -> None:
        facts = dataclasses.asdict(progress)
        tell("progress", **{name: value for name, value in facts.items() if name != "node"})

    stop.install(announces=False)
    environment.find_home()
    environment.reach_this_machine()
    try:
        with stop.unwinding():
            made = execute(_read(arguments), report)
    except Exception as error:
        if (known := boundary.known(error)) is None:
            raise
        tell("error", kind=type(known).__name__, message=known.message, hint=known.hint)
        print(f"{known}", file=sys.stderr)
        return known.exit_code
    tell("artifact", path=made.place, fingerprint=made.manifest.fingerprint, digest=made.digest)
    return 0


def _read(arguments: list[str]) -> StageRequest:
    if len(arguments) != 1:
        raise ConfigError("python -m pipelines.core.run_stage takes one argument: a file with a request, or -")
    try:
        text = sys.stdin.read() if arguments[0] == "-" else Path(arguments[0]).read_text(encoding="utf-8")
        return StageRequest.model_validate_json(text)
    except (OSError, ValueError) as error:  # no UTF-8, no JSON or no request
        raise ConfigError(f"{arguments[0]} is not a stage request: {error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
