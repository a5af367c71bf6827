"""What a checkpoint holds of one rank: taken from the optimizer, and put back under any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.optim.sharded_optimizer import FragmentOptimizer
from pipelines.core import fingerprint
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError
from pipelines.training import checkpoint_io
from pipelines.training.checkpoint_io import MASTER, Piece
from pipelines.training.distributed import Ranks

STATE = "state.json"
FORMAT = 2


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes."""

    step: int
    writers: int
    """Ranks 0 to `writers - 1` write: all of them, or rank 0 alone where all hold the same."""
    tensors: dict[Piece, Tensor]
    shapes: dict[str, tuple[int, ...]]
    state: str
    """Content of `state.json`."""

    @property
    def bytes(self) -> int:
        """Size of this rank's share."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def take(step: int, optimizer: FragmentOptimizer, state: Mapping[str, Any], ranks: Ranks, *, copy: bool) -> Snapshot:
    """Gather what this rank writes; with `copy`, training may go on changing it."""
    tensors: dict[Piece, Tensor] = {}
    for fragment in optimizer.fragments:
        if fragment.numel:
            for kind, tensor in ((MASTER, fragment.master), *optimizer.fragment_state(fragment).items()):
                piece = Piece(fragment.name, kind, fragment.start, fragment.numel)
                tensors[piece] = tensor.detach().to("cpu", copy=True) if copy else tensor
    content = {"format": FORMAT, "step": step, "counters": optimizer.counters(), "state": dict(state)}
    # ZeRO 0: every rank holds all of it, and one copy is enough. 48 bits are exact in the float64 that is gathered.
    contents = int(fingerprint.digest([piece.key for piece in sorted(tensors)])[:12], 16)
    writers = 1 if len(set(ranks.gathered(float(contents)))) == 1 else ranks.world
    return Snapshot(step, writers, tensors, dict(optimizer.layout.shapes), fingerprint.canonical_json(content))


def restore(found: Artifact, optimizer: FragmentOptimizer) -> dict[str, Any]:
    """Put a verified checkpoint into the optimizer; returns the loop's state and the step.

    Raises:
        IntegrityError: it is of another model, or was written by a newer checkout.
    """
    content = found.read_json(STATE)
    if content["format"] != FORMAT:
        raise IntegrityError(
            f"{found.path} has format {content['format']}; this program reads {FORMAT}",
            hint=f"go on with the version that wrote it, or delete {found.path.parent} and train from the start",
        )
    _refuse_other_model(found, content["shapes"], optimizer.layout.shapes)
    files = [found.path / name for name in sorted(found.manifest.files) if name.endswith(".safetensors")]
    with checkpoint_io.Reader(files) as reader:
        empty = []
        for fragment in optimizer.fragments:
            where = (fragment.start, fragment.numel)
            if fragment.numel:
                fragment.master.copy_(reader.read(fragment.name, MASTER, *where))
            moments = [kind for kind in reader.kinds(fragment.name, *where) if kind != MASTER]
            if moments:
                loaded = {kind: reader.read(fragment.name, kind, *where) for kind in moments}
                optimizer.load_fragment_state(fragment, loaded)
            else:
                empty.append(fragment)
        # Last: loading one fragment may allocate moments for its neighbours in the same flat buffer.
        for fragment in empty:
            optimizer.load_fragment_state(fragment, {})
    optimizer.load_counters(content["counters"])
    return {**content["state"], "step": content["step"]}


def _refuse_other_model(found: Artifact, saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> None:
    """Compare all tensors, not this rank's only: every rank must come to the same answer."""
    for name in sorted({*saved, *own}):
        here, there = (list(shapes[name]) if name in shapes else "absent" for shapes in (own, saved))
        if here != there:
            raise IntegrityError(f"{found.path} is of another model: {name} is {here}, saved was {there}")
