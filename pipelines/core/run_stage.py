"""Run one stage: cache, lease, body, publication. The wrapper that every stage shares."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping

from pipelines.core import artifact, disk, fingerprint, progress_bars, provenance
from pipelines.core.artifact import Artifact
from pipelines.core.settings import Settings
from pipelines.core.stage import Stage, StageContext
from pipelines.core.store import Store


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
    with store.lease(stage.name, resume_key, wait_s=wait_s):
        # Another run may have published it while this one waited for the lease.
        if not force and (cached := store.find(stage.name, key)):
            return cached
        for used in inputs.values():
            used.verify()
        scratch = store.scratch(stage.name, resume_key)
        scratch.mkdir(parents=True, exist_ok=True)
        build = store.build_folder(stage.name, resume_key)
        started = time.monotonic()
        at_work = dataclasses.replace(context, scratch=scratch, store=store.root)
        with disk.explained(f"the artifact of {context.node}", build, remove=True), progress_bars.bars():
            summary = stage.body()(config, inputs, build, at_work)
            made_by = provenance.capture(
                duration_s=time.monotonic() - started, source_digest=stage.source_digest(), data_hash=data_hash
            )
            published = artifact.publish(
                build,
                store.path(stage.name, key),
                stage=stage.name,
                node=context.node,
                identity=identity,
                parents={name: used.digest for name, used in inputs.items()},
                summary=summary,
                provenance=made_by,
                observations=stage.observations,
            )
        shutil.rmtree(scratch, ignore_errors=True)
        return published
