"""Packed sequences on disk: plain `.npy` shards of bounded size, found through `index.json`, read by memory map.

Beside each shard lies its document map, uint32 [parts, 4]: of each part of a document the sequence in the shard, the
first column, the number of the document in `documents/SPLIT.jsonl.zst`, and the token of it that the part begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.core.artifact import read_json
from pipelines.core.errors import IntegrityError
from pipelines.data.packing import Block

INDEX = "index.json"
FORMAT = 1
DTYPES = ("uint16", "uint32")


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    file: str = Field(pattern=r"^[A-Za-z0-9_-]+/[A-Za-z0-9_-]+\.npy$")
    sequences: int = Field(ge=0)


class _Split(BaseModel):
    model_config = ConfigDict(strict=True)

    shards: list[_Shard]


class _Index(BaseModel):
    """What every reader relies on; the file has more."""

    model_config = ConfigDict(strict=True)

    sequence_length: int = Field(ge=1)
    splits: dict[str, _Split]


def dtype_for(vocab_size: int) -> str:
    """Return the smallest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write(
    blocks: Iterable[Block], folder: Path, split: str, *, sequence_length: int, dtype: str, shard_bytes: int
) -> list[dict[str, Any]]:
    """Write a stream of sequences as shards of one split and return their index entries.

    Each sequence is copied twice, whatever the size of the blocks: time is linear, memory that of one shard.

    Args:
        blocks: sequences and their document maps.
        folder: folder of the artifact; shards go to `folder/split`.
        split: name of the split.
        sequence_length: tokens per sequence.
        dtype: type on disk.
        shard_bytes: a shard holds as many whole sequences as fit, at least one.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    limit = max(shard_bytes // (sequence_length * np.dtype(dtype).itemsize), 1)
    entries: list[dict[str, Any]] = []
    pending: list[NDArray[Any]] = []
    maps: list[NDArray[Any]] = []
    shifts: list[int] = []  # what makes a sequence's number in its block that in the shard
    waiting = 0  # sequences in `pending`

    def flush() -> None:
        name = f"{split}/shard-{len(entries):05}"
        np.save(folder / f"{name}.npy", np.concatenate(pending), allow_pickle=False)
        map_P4 = np.concatenate(maps)
        map_P4[:, 0] += np.repeat(shifts, [len(each) for each in maps])
        np.save(folder / f"{name}.map.npy", map_P4.astype(np.uint32), allow_pickle=False)
        entries.append({"file": f"{name}.npy", "map": f"{name}.map.npy", "sequences": waiting})

    for block in blocks:
        start, first = 0, 0
        while start < len(block.tokens_ST):
            part = block.tokens_ST[start : start + limit - waiting].astype(dtype)
            pending.append(part)
            whole = start + len(part) == len(block.tokens_ST)
            end = len(block.map_P4) if whole else int(np.searchsorted(block.map_P4[:, 0], start + len(part)))
            maps.append(block.map_P4[first:end])
            shifts.append(waiting - start)
            start, first, waiting = start + len(part), end, waiting + len(part)
            if waiting == limit:
                flush()
                pending, maps, shifts, waiting = [], [], [], 0
    if waiting:
        flush()
    return entries


def read_index(folder: Path) -> dict[str, Any]:
    """Read `index.json`.

    Raises:
        IntegrityError: missing, damaged or of another format.
    """
    path = folder / INDEX
    try:
        index: dict[str, Any] = read_json(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} cannot be read: {error}", hint="run the prepare stage again") from None
    if not isinstance(index, dict):
        raise IntegrityError(f"{path} is damaged: it holds no table", hint="run the prepare stage again")
    if index.get("format") != FORMAT or index.get("dtype") not in DTYPES:
        raise IntegrityError(
            f"{path} has format {index.get('format')!r} and dtype {index.get('dtype')!r}; "
            f"this checkout reads format {FORMAT} with {' or '.join(DTYPES)}"
        )
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{path} is damaged: {where}: {first['msg']}", hint="run the prepare stage again"
        ) from None
    return index


class ShardReader:
    """The sequences of one split, in order, read where they are needed.

    Args:
        folder: a prepare artifact.
        split: train, validation or test.

    Raises:
        IntegrityError: a shard is missing, holds objects, or is not shaped as the index says.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.index = read_index(folder)
        if split not in self.index["splits"]:
            raise IntegrityError(f"{folder / INDEX} has no split {split!r}; it has {', '.join(self.index['splits'])}")
        self.sequence_length: int = self.index["sequence_length"]
        entries = self.index["splits"][split]["shards"]
        self._folder, self._entries = folder, entries
        self._shards = [_open(folder, entry, self.index) for entry in entries]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        return self.take([number])[0]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences with these numbers, int64 [n, sequence_length].

        Raises:
            IndexError: a number is outside 0..len-1.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"sequence numbers {wanted.min()}..{wanted.max()} are outside 0..{len(self) - 1}")
        out = np.empty((len(wanted), self.sequence_length), dtype=np.int64)
        home = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(home):
            rows = home == shard
            out[rows] = self._shards[shard][wanted[rows] - self._starts[shard]]
        return out

    def parts(self, number: int) -> NDArray[np.int64]:
        """Return what a sequence holds [parts, 3]: first column, number of the document, and its token there.

        Raises:
            IndexError: there is no such sequence.
            IntegrityError: the document map is missing or damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sequence number {number} is outside 0..{len(self) - 1}")
        home = int(np.searchsorted(self._starts, number, side="right")) - 1
        path = self._folder / self._entries[home]["map"]
        try:
            map_P4 = np.load(path, mmap_mode="r", allow_pickle=False)
            first, end = np.searchsorted(map_P4[:, 0], [number - self._starts[home], number - self._starts[home] + 1])
            parts_P3: NDArray[np.int64] = map_P4[first:end, 1:].astype(np.int64)
        except (OSError, ValueError, IndexError) as error:
            hint = "delete the artifact and run again"
            raise IntegrityError(f"{path} is not a document map: {error}", hint=hint) from None
        return parts_P3


def _open(folder: Path, entry: Mapping[str, Any], index: Mapping[str, Any]) -> NDArray[Any]:
    path = folder / entry["file"]
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(f"{path} is not a shard: {error}", hint="delete the artifact and run again") from None
    expected = (entry["sequences"], index["sequence_length"])
    if shard.shape != expected or shard.dtype != np.dtype(index["dtype"]):
        raise IntegrityError(
            f"{path} holds {shard.dtype} {shard.shape}; the index says {index['dtype']} {expected}",
            hint="delete the artifact and run again",
        )
    return shard
