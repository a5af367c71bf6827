"""Shards: what is written is read, in shards of bounded size, and a damaged shard is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.errors import IntegrityError
from pipelines.data import shards
from pipelines.data.packing import Block

LENGTH = 8


def artifact(folder: Path, sequences: np.ndarray, blocks: list[int], shard_bytes: int = 64) -> Path:
    """Write `sequences` as the train split in pieces of the given sizes, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = np.split(sequences, np.cumsum(blocks)[:-1]) if blocks else [sequences]
    firsts = np.cumsum([0, *map(len, pieces)])
    entries = shards.write(
        map(Block.of_rows, pieces, firsts.tolist()),
        folder,
        "train",
        sequence_length=LENGTH,
        dtype="uint16",
        shard_bytes=shard_bytes,
    )
    index: dict[str, Any] = {
        "format": 1,
        "sequence_length": LENGTH,
        "dtype": "uint16",
        "splits": {"train": {"shards": entries, "sequences": len(sequences)}},
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def numbered(count: int) -> np.ndarray:
    return np.arange(count * LENGTH).reshape(count, LENGTH) % 60_000


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 200))
def test_the_reader_returns_what_was_written_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[int], shard_bytes: int
) -> None:
    sequences = numbered(sum(blocks))
    folder = artifact(tmp_path_factory.mktemp("a"), sequences, blocks, shard_bytes)
    reader = shards.ShardReader(folder, "train")
    assert len(reader) == len(sequences)
    assert reader.take(range(len(sequences))).tolist() == sequences.tolist()
    assert [reader.parts(number).tolist() for number in range(len(sequences))] == [
        [[0, number, 0]] for number in range(len(sequences))
    ]
    limit = max(shard_bytes // (LENGTH * 2), 1)
    sizes = [entry["sequences"] for entry in reader.index["splits"]["train"]["shards"]]
    assert all(size == limit for size in sizes[:-1])
    assert all(0 < size <= limit for size in sizes)


def test_writing_takes_time_that_grows_with_the_sequences_and_not_with_their_square(tmp_path: Path) -> None:
    """Asking every waiting block again, or joining the rest again for each shard, took 25 s for 64,000 blocks."""

    def seconds(count: int) -> float:
        blocks = [Block.of_rows(np.zeros((1, LENGTH), np.int64))] * count
        started = time.process_time()
        shards.write(blocks, tmp_path, "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=1 << 26)
        return time.process_time() - started

    seconds(10)
    assert seconds(32_000) < 6 * seconds(8_000) + 0.1


def test_take_follows_the_order_and_the_repetitions_asked_for(tmp_path: Path) -> None:
    reader = shards.ShardReader(artifact(tmp_path, numbered(20), [20]), "train")
    wanted = [19, 0, 7, 7, 3]
    assert reader.take(wanted).dtype == np.int64
    assert reader.take(wanted).tolist() == numbered(20)[wanted].tolist()
    assert reader[4].tolist() == numbered(20)[4].tolist()
    assert reader.take([]).shape == (0, LENGTH)


@pytest.mark.parametrize("number", [-1, 20])
def test_a_sequence_that_does_not_exist_is_refused(tmp_path: Path, number: int) -> None:
    reader = shards.ShardReader(artifact(tmp_path, numbered(20), [20]), "train")
    with pytest.raises(IndexError, match=r"outside 0\.\.19"):
        reader.take([0, number])
    with pytest.raises(IndexError, match=r"outside 0\.\.19"):
        reader.parts(number)


def test_a_document_map_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = artifact(tmp_path, numbered(4), [4])
    (folder / "train" / "shard-00000.map.npy").unlink()
    with pytest.raises(IntegrityError, match=r"shard-00000\.map\.npy is not a document map"):
        shards.ShardReader(folder, "train").parts(0)


def test_a_sequence_of_several_parts_is_told_whole(tmp_path: Path) -> None:
    tokens = np.full((5, LENGTH), 9)
    places = [(row, column, 10 * row + column, column == 0) for row in range(5) for column in range(row + 1)]
    (folder := tmp_path / "a").mkdir()
    block = Block(tokens, np.array(places))
    entries = shards.write([block], folder, "train", sequence_length=LENGTH, dtype="uint16", shard_bytes=2 * LENGTH * 2)
    index = {"format": 1, "sequence_length": LENGTH, "dtype": "uint16", "splits": {"train": {"shards": entries}}}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    reader = shards.ShardReader(folder, "train")
    for row in range(5):
        expected = [[column, 10 * row + column, int(column == 0)] for column in range(row + 1)]
        assert reader.parts(row).tolist() == expected


def test_shards_are_mapped_not_loaded(tmp_path: Path) -> None:
    reader = shards.ShardReader(artifact(tmp_path, numbered(20), [20]), "train")
    assert all(isinstance(shard, np.memmap) for shard in reader._shards)


def replace(path: Path, array: np.ndarray, allow_pickle: bool = False) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=allow_pickle)


def test_an_object_array_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (sentinel,))

    folder = artifact(tmp_path / "a", numbered(4), [4])
    replace(folder / "train" / "shard-00000.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match=r"shard-00000\.npy is not a shard"):
        shards.ShardReader(folder, "train")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "array", [np.zeros((4, LENGTH), np.uint32), np.zeros((3, LENGTH), np.uint16), np.zeros((4, 9), np.uint16)]
)
def test_a_shard_that_contradicts_the_index_is_refused_with_both_shapes(tmp_path: Path, array: np.ndarray) -> None:
    folder = artifact(tmp_path, numbered(4), [4])
    replace(folder / "train" / "shard-00000.npy", array)
    with pytest.raises(IntegrityError, match=r"shard-00000\.npy holds .* the index says uint16 \(4, 8\)"):
        shards.ShardReader(folder, "train")


def test_a_cut_or_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = artifact(tmp_path, numbered(4), [4])
    shard = folder / "train" / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(IntegrityError, match="is not a shard"):
        shards.ShardReader(folder, "train")
    shard.unlink()
    with pytest.raises(IntegrityError, match="is not a shard"):
        shards.ShardReader(folder, "train")


@pytest.mark.parametrize("index", ["", "{", '{"format": 2, "dtype": "uint16"}', '{"format": 1, "dtype": "object"}'])
def test_an_index_that_cannot_be_understood_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"index\.json"):
        shards.ShardReader(tmp_path, "train")


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no split 'dev'; it has train"):
        shards.ShardReader(artifact(tmp_path, numbered(4), [4]), "dev")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(260, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_type_on_disk_holds_every_token(vocab_size: int, dtype: str) -> None:
    assert shards.dtype_for(vocab_size) == dtype
    assert vocab_size - 1 <= np.iinfo(dtype).max
