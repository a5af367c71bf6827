"""The payload of a checkpoint: safetensors files whose tensor names say which elements of which tensor they hold.

A rank writes what it owns, cut as its ZeRO stage and world size happen to cut; a reader asks for any range of any
tensor and gets it assembled from whichever files hold it. So a checkpoint belongs to no particular sharding.

    key = "<kind>|<start>|<numel>|<tensor name>"        kind: "master", or the name of a moment

The writer streams: one pass for bytes and sha256, no second copy of the tensors in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.core.artifact import FileRecord
from pipelines.core.errors import IntegrityError
from pipelines.core.fault_injection import fault_point

MASTER = "master"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


@dataclass(frozen=True, order=True)
class Piece:
    """A range of elements of one kind of one tensor."""

    name: str
    kind: str
    start: int
    numel: int

    @property
    def key(self) -> str:
        """Name of the piece inside a file."""
        return f"{self.kind}|{self.start}|{self.numel}|{self.name}"

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return the piece that a key names; ValueError if it names none."""
        kind, start, numel, name = key.split("|", 3)
        return cls(name, kind, int(start), int(numel))


def write(path: Path, tensors: Mapping[Piece, Tensor]) -> FileRecord:
    """Write 1-D tensors to a safetensors file and force it on to the disk.

    Returns:
        Size and sha256, taken while writing.
    """
    sha, size = hashlib.sha256(), 0
    chunks: Iterable[bytes | memoryview] = itertools.chain([_header(tensors)], map(_raw, tensors.values()))
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            sha.update(chunk)
            size += len(chunk)
            fault_point("checkpoint.mid_shard", path=path)
        stream.flush()
        os.fsync(stream.fileno())
    fault_point("checkpoint.after_shard", path=path)
    return FileRecord(sha256=sha.hexdigest(), size=size)


def _header(tensors: Mapping[Piece, Tensor]) -> bytes:
    entries, offset = {}, 0
    for piece, tensor in tensors.items():
        if tensor.shape != (piece.numel,):
            raise ValueError(f"{piece.key}: the tensor has shape {tuple(tensor.shape)}, not [{piece.numel}]")
        end = offset + tensor.numel() * tensor.element_size()
        entries[piece.key] = {"dtype": _DTYPES[tensor.dtype], "shape": [piece.numel], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


class Reader:
    """Ranges of tensors out of the files of one checkpoint. Use as a context manager: files stay open inside.

    Args:
        paths: the files, whatever ranks wrote them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._pieces: dict[str, dict[str, list[tuple[Piece, Any]]]] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for path in self._paths:
                try:
                    opened = stack.enter_context(safe_open(path, framework="pt"))
                    pieces = [Piece.parse(key) for key in opened.keys()]  # noqa: SIM118 - not a mapping
                except (SafetensorError, ValueError) as error:
                    raise IntegrityError(f"{path} is no checkpoint shard: {error}") from error
                for piece in pieces:
                    self._pieces.setdefault(piece.name, {}).setdefault(piece.kind, []).append((piece, opened))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kinds(self, name: str, start: int, numel: int) -> list[str]:
        """Return the kinds of which this range has at least one element."""
        return sorted(
            kind
            for kind, pieces in self._pieces.get(name, {}).items()
            if any(_overlap(piece, start, numel) for piece, _ in pieces)
        )

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Return elements `start` to `start + numel` of the flattened tensor, [numel], on the CPU.

        Raises:
            IntegrityError: if the files do not hold all of them exactly once.
        """
        parts, position = [], start
        for piece, opened in sorted(self._pieces.get(name, {}).get(kind, ()), key=lambda pair: pair[0]):
            if (overlap := _overlap(piece, start, numel)) and overlap[0] == position:
                parts.append(opened.get_slice(piece.key)[overlap[0] - piece.start : overlap[1] - piece.start])
                position = overlap[1]
        if position != start + numel:
            raise IntegrityError(
                f"the checkpoint lacks elements {position} to {start + numel} of {name} ({kind})",
                hint="it was written by an incompatible version; delete it to start from the one before",
            )
        return torch.cat(parts) if parts else torch.empty(0)


def _overlap(piece: Piece, start: int, numel: int) -> tuple[int, int] | None:
    first, last = max(piece.start, start), min(piece.start + piece.numel, start + numel)
    return (first, last) if first < last else None


def uncovered(shapes: Mapping[str, Sequence[int]], spans: Iterable[tuple[str, int, int]]) -> Iterator[str]:
    """Yield a message for every tensor whose elements the (name, start, numel) spans do not cover exactly once."""
    by_name: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for name, start, numel in spans:
        by_name[name].append((start, numel))
    for name, shape in shapes.items():
        position = 0
        for start, numel in sorted(by_name[name]):
            if start != position:
                break
            position += numel
        else:
            if position == torch.Size(shape).numel():
                continue
        yield f"{name} {list(shape)} is held in (start, length) {sorted(by_name[name])}"
