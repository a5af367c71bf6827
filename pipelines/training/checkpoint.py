"""Checkpoints: hashed artifacts, written by all ranks together, of which the newest valid one wins.

    checkpoints/step-00000050/rank-00000.safetensors ...   what each rank owns; see `shards.py`
                              state.json                   step, counters, loop state, shapes
                              manifest.json                hashes, written last, sealed
    checkpoints/step-00000040.corrupt/                     found damaged, kept for a look
    checkpoints/.writing-00000060/                         unfinished; removed at the next start

A checkpoint appears by one rename. It belongs to no ZeRO stage and no world size: each rank reads the ranges it owns
from whichever files hold them. A rank that sees a fault tells the others before anyone acts on it, so all ranks always
choose the same checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core import artifact, disk, fingerprint, node_files
from pipelines.core.artifact import Artifact, FileRecord, Manifest
from pipelines.core.errors import ConfigError, IngotError, IntegrityError, TransientError
from pipelines.core.fault_injection import fault_point
from pipelines.core.launcher import beat
from pipelines.training import checkpoint_io, snapshot
from pipelines.training.checkpoint_io import MASTER
from pipelines.training.distributed import Ranks
from pipelines.training.snapshot import STATE, Snapshot

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8})")
_BROUGHT, _SENDING = ".brought", ".sending"
_TEMPORARY = (".writing-*", ".pruned-*", ".retired-*", _BROUGHT, _SENDING)
_POLL_S = 0.02
_BEAT_S = 1.0
"""A rank that waits for a disk is alive, and says so this often."""


@dataclass
class _PendingSave:
    """One save, from the snapshot to publication."""

    snapshot: Snapshot
    ranks: Ranks
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    error: Exception | None = None
    thread: threading.Thread | None = None


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        folder: where they lie. Ranks on a node that does not see it have a folder of their own, which stands for it.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 2:
            raise ConfigError(
                f"keep is {keep}; at least 2 checkpoints are needed, because the newest may turn out to be damaged"
            )
        self.folder = folder
        self.keep = keep
        self._pending: _PendingSave | None = None
        self._first_node = node_files.of_rank()
        if self._first_node is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def fallbacks(self) -> int:
        """How many checkpoints of this run were found damaged, over all its attempts."""
        return len(list(self.folder.glob("*.corrupt*")))

    def steps(self) -> list[int]:
        """Return the steps of the published checkpoints, oldest first; by name, as clocks and mtimes may lie."""
        found = (_STEP.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    # ---- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        optimizer: FragmentOptimizer,
        state: Mapping[str, Any],
        *,
        rank: int,
        world: int,
        wait: bool = True,
    ) -> None:
        """Save masters, moments, counters and `state`; a collective call.

        A checkpoint of this step that exists already is left as it is.

        Args:
            step: optimizer steps done.
            optimizer: what to save, in fragments.
            state: JSON facts of the training loop, the same on all ranks.
            rank: this rank.
            world: number of ranks.
            wait: return when the checkpoint is published; else when the tensors are copied, and it is published in the
                background. Errors then surface in the next `save` or in `finish`.

        Raises:
            TransientError: the disk is full, also after older checkpoints were pruned.
        """
        self.finish()
        ranks = _ranks(rank, world)
        if _agreed(ranks, self._final(step).exists()):
            return
        pending = _PendingSave(snapshot.take(step, optimizer, state, ranks, copy=not wait), ranks)
        self._start(pending)
        self._pending = pending
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background; a collective call. Raises what `save` raises."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        for last in (False, True):
            fault = self._outcome(pending)
            if fault is None:
                return
            if pending.ranks.rank == 0:
                shutil.rmtree(self._build(pending.snapshot.step), ignore_errors=True)
                if not last:
                    self._make_room()
            if last or not isinstance(fault, TransientError):
                raise fault
            log.warning("%s; trying once more with older checkpoints removed", fault.message)
            pending.ranks.barrier()
            pending.error, pending.abandoned = None, False
            pending.written.clear()
            self._start(pending)

    def _start(self, pending: _PendingSave) -> None:
        build = self._build(pending.snapshot.step)
        if pending.ranks.rank == 0:
            fault_point("checkpoint.before_write", step=pending.snapshot.step)
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
        pending.ranks.barrier()  # by now every rank has read what was brought
        if self._first_node is not None:
            shutil.rmtree(self.folder / _BROUGHT, ignore_errors=True)
        pending.thread = threading.Thread(
            target=self._work, args=(pending,), name=f"checkpoint-{pending.snapshot.step}"
        )
        pending.thread.start()

    def _work(self, pending: _PendingSave) -> None:
        """Write this rank's share, and on rank 0 publish when every rank has; runs in a thread, without collectives."""
        try:
            if pending.ranks.rank < pending.snapshot.writers:
                self._write_share(pending)
            pending.written.set()
            if pending.ranks.rank == 0 and self._others_have_written(pending):
                self._publish(pending)
        except Exception as error:  # noqa: BLE001 - it is raised again in `finish`, on all ranks
            pending.error = error
            pending.written.set()

    def _write_share(self, pending: _PendingSave) -> None:
        build, rank = self._build(pending.snapshot.step), pending.ranks.rank
        first, own = self._first_node, self.folder / _SENDING if self._first_node else build
        if first is not None:
            own.mkdir(exist_ok=True)
        path = own / f"rank-{rank:05d}.safetensors"
        record = checkpoint_io.write(path, pending.snapshot.tensors)
        spans = [(piece.name, piece.start, piece.numel) for piece in pending.snapshot.tensors if piece.kind == MASTER]
        note = {"file": path.name, "record": record.model_dump(), "spans": spans}
        # Rank 0 may publish, and so rename the folder, as soon as it sees the last note.
        artifact.replace_text(_note(own, rank), json.dumps(note))
        if first is not None:
            for file in (path, _note(own, rank)):
                first.put(file, build / file.name)
                file.unlink()

    def _others_have_written(self, pending: _PendingSave) -> bool:
        build = self._build(pending.snapshot.step)
        missing = set(range(pending.snapshot.writers))
        pause = threading.Event()
        while not pending.abandoned:
            missing = {rank for rank in missing if not _note(build, rank).exists()}
            if not missing:
                return True
            pause.wait(_POLL_S)
        return False

    def _publish(self, pending: _PendingSave) -> None:
        build = self._build(pending.snapshot.step)
        fault_point("checkpoint.after_shards", step=pending.snapshot.step, path=build)
        notes = [json.loads(_note(build, rank).read_text(encoding="utf-8")) for rank in range(pending.snapshot.writers)]
        spans = [tuple(span) for note in notes for span in note["spans"]]
        if gaps := list(checkpoint_io.uncovered(pending.snapshot.shapes, spans)):
            raise IngotError("the ranks do not hold every weight exactly once: " + "; ".join(gaps[:3]))
        for rank in range(pending.snapshot.writers):
            _note(build, rank).unlink()
        artifact.write_text(
            build / STATE, json.dumps({**json.loads(pending.snapshot.state), "shapes": pending.snapshot.shapes})
        )
        files = {note["file"]: FileRecord.model_validate(note["record"]) for note in notes}
        state = build / STATE
        files[STATE] = FileRecord(sha256=fingerprint.hash_file(state), size=state.stat().st_size)
        identity = {"stage": "checkpoint", "step": pending.snapshot.step}
        manifest = Manifest(
            stage="checkpoint",
            node="pretrain",
            fingerprint=fingerprint.digest(identity),
            identity=identity,
            parents={},
            files=files,
            summary={"step": pending.snapshot.step, "world": pending.ranks.world},
        )
        artifact.commit(build, self._final(pending.snapshot.step), manifest)
        self._prune(self.keep)

    def _outcome(self, pending: _PendingSave) -> IngotError | Exception | None:
        """Wait for all ranks, and return what went wrong on any of them; the same kind of error on every rank."""
        assert pending.thread is not None
        while not pending.written.wait(_BEAT_S):
            beat()
        try:
            pending.abandoned = not _agreed(pending.ranks, pending.error is None, every=True)
        except BaseException:
            pending.abandoned = True  # a rank is gone: rank 0 must not wait for its share
            raise
        while pending.thread.is_alive():
            beat()
            pending.thread.join(_BEAT_S)
        full = disk.is_full(pending.error)
        failed = pending.ranks.gathered(float(pending.error is not None))
        without_space, needed = pending.ranks.summed(
            [float(full), float(pending.snapshot.bytes if pending.ranks.rank < pending.snapshot.writers else 0)]
        )
        if not any(failed):
            return None
        if without_space and without_space == sum(failed):
            free = shutil.disk_usage(self.folder).free
            return TransientError(
                f"no space for the checkpoint of step {pending.snapshot.step} in {self.folder}: it needs {needed:.0f} "
                f"bytes, {free} are free",
                hint="free some space and run the same command again: it goes on from the newest checkpoint",
            )
        blamed = ", ".join(str(rank) for rank, error in enumerate(failed) if error)
        return pending.error or IngotError(
            f"the checkpoint of step {pending.snapshot.step} failed on rank {blamed}; see its log"
        )

    # ---- retention ------------------------------------------------------------------------------------------------

    def _prune(self, keep: int) -> None:
        """Remove the oldest; renamed first, so that no half-deleted folder ever looks like a checkpoint."""
        for step in self.steps()[:-keep]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        pruned = self.folder / f".pruned-{step:08d}"
        self._final(step).rename(pruned)
        fault_point("checkpoint.during_pruning", step=step, path=pruned)
        shutil.rmtree(pruned)

    def _make_room(self) -> None:
        self._prune(1)
        for pattern in (*_TEMPORARY, "*.corrupt*/rank-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ---- loading --------------------------------------------------------------------------------------------------

    def load_latest(self, optimizer: FragmentOptimizer, *, rank: int, world: int) -> dict[str, Any] | None:
        """Load the newest valid checkpoint into the optimizer; a collective call, the same result on all ranks.

        A damaged one is renamed `*.corrupt` and counted in `fallbacks`. Only the masters are loaded: making the live
        weights follow is the engine's part. Temporary folders of killed attempts are removed.

        Returns:
            The saved loop state with its `step`; None where no checkpoint was ever published.

        Raises:
            IntegrityError: there are checkpoints, but none is valid.
        """
        ranks = _ranks(rank, world)
        if rank == 0:
            for pattern in _TEMPORARY:
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path)
        for step in self._common_steps(ranks):
            if self._first_node is not None and os.environ["LOCAL_RANK"] == "0":
                self._first_node.get_folder(self._final(step), self.folder / _BROUGHT)
            ranks.barrier()
            found, fault = self._verified(step, ranks)
            if _agreed(ranks, fault is None, every=True):
                assert found is not None
                return snapshot.restore(found, optimizer)
            log.warning(
                "checkpoint of step %d is damaged%s", step, f": {fault}" if fault else " (seen by another rank)"
            )
            if rank == 0:
                self._set_aside(step)
            ranks.barrier()
        if _agreed(ranks, self.fallbacks > 0):
            raise IntegrityError(
                f"{self.folder} has checkpoints, but every one is damaged; see the log for files and hashes",
                hint=f"to train again from the start, delete {self.folder}",
            )
        return None

    def load(self, step: int, optimizer: FragmentOptimizer) -> dict[str, Any]:
        """Load one checkpoint in a process without peers, and change no file.

        Raises:
            IntegrityError: it is gone or damaged.
        """
        found, fault = self._verified(step, Ranks(0, 1, torch.device("cpu")))
        if found is None:
            raise IntegrityError(f"the checkpoint of step {step} in {self.folder} cannot be used: {fault}")
        return snapshot.restore(found, optimizer)

    def go_back(self, before: int, optimizer: FragmentOptimizer, *, rank: int, world: int) -> dict[str, Any]:
        """Remove the checkpoints of step `before` and later, and load the newest that is left; a collective call.

        Raises:
            IntegrityError: none is left.
        """
        self.finish()
        ranks = _ranks(rank, world)
        if rank == 0:
            for step in self.steps():
                if step >= before:
                    self._remove(step)
        ranks.barrier()
        loaded = self.load_latest(optimizer, rank=rank, world=world)
        if loaded is None:
            raise IntegrityError(f"{self.folder} has no checkpoint before step {before} to go back to")
        return loaded

    def _common_steps(self, ranks: Ranks) -> list[int]:
        """Return rank 0's list, newest first: a shared file system may show another rank an older one."""
        own = self.steps()[::-1] if ranks.rank == 0 else []
        (count,) = ranks.summed([float(len(own))])
        return [int(step) for step in ranks.summed([float(s) for s in own] or [0.0] * int(count))] if count else []

    def _verified(self, step: int, ranks: Ranks) -> tuple[Artifact | None, IntegrityError | None]:
        """Check manifest and layout on every rank, and hash this rank's part of the files."""
        try:
            found = artifact.load(self.folder / _BROUGHT if self._first_node else self._final(step))
            for name in sorted(found.manifest.files)[ranks.rank :: ranks.world]:
                artifact.verify_file(found.path / name, found.manifest.files[name])
                beat()
        except IntegrityError as error:
            return None, error
        return found, None

    def _set_aside(self, step: int) -> None:
        base = f"step-{step:08d}.corrupt"
        taken = len(list(self.folder.glob(base + "*")))
        self._final(step).rename(self.folder / (f"{base}-{taken + 1}" if taken else base))

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _build(self, step: int) -> Path:
        return self.folder / f".writing-{step:08d}"


def _note(build: Path, rank: int) -> Path:
    """Return where a rank says that its share is written."""
    return build / f"rank-{rank:05d}.json"


def _ranks(rank: int, world: int) -> Ranks:
    """Return the ranks; what they tell each other here is on the host."""
    return Ranks(rank, world, torch.device("cpu"))


def _agreed(ranks: Ranks, fact: bool, *, every: bool = False) -> bool:
    """Return what rank 0 says of a fact, or with `every`, whether all ranks say so."""
    facts = ranks.gathered(float(fact))
    return all(facts) if every else bool(facts[0])
