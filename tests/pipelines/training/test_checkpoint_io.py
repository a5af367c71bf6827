"""Shards: plain safetensors files, and any range of any tensor out of any cut of them."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pipelines.core.errors import IntegrityError
from pipelines.training import checkpoint_io
from pipelines.training.checkpoint_io import MASTER, Piece, Reader, uncovered, write


def test_a_key_reads_back_as_its_piece_whatever_the_tensor_is_called() -> None:
    for name in ("layers.0.weight", "odd|name|3", "ümlaut", "", "a b"):
        piece = Piece(name, "exp_avg", 12, 34)
        assert Piece.parse(piece.key) == piece


@pytest.mark.parametrize("key", ["weight", "master|x|3|w", "master|1|w"])
def test_a_foreign_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        Piece.parse(key)


@pytest.mark.parametrize("dtype", list(checkpoint_io._DTYPES))
def test_the_library_reads_what_the_streaming_writer_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = (torch.arange(13) * 37 % 5).to(dtype)
    record = write(tmp_path / "f", {Piece("w", MASTER, 5, 13): numbers, Piece("v|x", MASTER, 0, 1): numbers[:1]})
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert set(opened.keys()) == {"master|5|13|w", "master|0|1|v|x"}
        loaded = opened.get_tensor("master|5|13|w")
    assert loaded.dtype == dtype
    assert torch.equal(loaded, numbers)
    content = (tmp_path / "f").read_bytes()
    assert (record.sha256, record.size) == (hashlib.sha256(content).hexdigest(), len(content))


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = torch.tensor(
        [0, -(2**31), 0x7FC00001, 0x7F800000, 1, 0x007FFFFF], dtype=torch.int32
    )  # 0, -0, NaN, inf, tiny
    write(tmp_path / "f", {Piece("w", MASTER, 0, 6): bits.view(torch.float32)})
    with Reader([tmp_path / "f"]) as reader:
        assert torch.equal(reader.read("w", MASTER, 0, 6).view(torch.int32), bits)


def test_a_view_into_a_larger_buffer_writes_its_own_elements_only(tmp_path: Path) -> None:
    buffer = torch.arange(100.0)
    record = write(tmp_path / "f", {Piece("w", MASTER, 0, 4): buffer.narrow(0, 10, 4)})
    assert record.size < 200
    with Reader([tmp_path / "f"]) as reader:
        assert reader.read("w", MASTER, 0, 4).tolist() == [10, 11, 12, 13]


def test_a_tensor_that_does_not_fit_its_piece_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"master\|0\|3\|w: the tensor has shape \(4,\), not \[3\]"):
        write(tmp_path / "f", {Piece("w", MASTER, 0, 3): torch.zeros(4)})


@given(
    size=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    span=st.tuples(st.integers(0, 39), st.integers(0, 40)),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_comes_out_of_any_cut(tmp_path: Path, size: int, cuts: list[int], span: tuple[int, int]) -> None:
    whole = torch.arange(float(size)) + 0.5
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    paths = []
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        paths.append(tmp_path / f"{number}")
        write(paths[-1], {Piece("w", MASTER, first, last - first): whole[first:last]})
    start = min(span[0], size - 1)
    numel = min(span[1], size - start)
    with Reader(paths[::-1]) as reader:
        assert torch.equal(reader.read("w", MASTER, start, numel), whole[start : start + numel])


def test_a_hole_is_named_by_its_first_missing_element(tmp_path: Path) -> None:
    write(tmp_path / "a", {Piece("w", MASTER, 0, 3): torch.zeros(3)})
    write(tmp_path / "b", {Piece("w", MASTER, 5, 3): torch.zeros(3)})
    with Reader([tmp_path / "a", tmp_path / "b"]) as reader:
        assert reader.read("w", MASTER, 5, 3).numel() == 3
        with pytest.raises(IntegrityError, match=r"lacks elements 3 to 8 of w \(master\)"):
            reader.read("w", MASTER, 0, 8)
        with pytest.raises(IntegrityError, match="lacks elements 0 to 2 of absent"):
            reader.read("absent", MASTER, 0, 2)


def test_kinds_are_those_that_touch_the_range(tmp_path: Path) -> None:
    zeros = torch.zeros(4)
    write(tmp_path / "f", {
        Piece("w", MASTER, 0, 4): zeros, Piece("w", MASTER, 4, 4): zeros, Piece("w", "exp_avg", 4, 4): zeros,
    })  # fmt: skip
    with Reader([tmp_path / "f"]) as reader:
        assert reader.kinds("w", 0, 4) == [MASTER]
        assert reader.kinds("w", 3, 2) == ["exp_avg", MASTER]
        assert reader.kinds("other", 0, 4) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",  # a pickle
        (2**40).to_bytes(8, "little") + b"{}",  # a header beyond the end of the file
        (10**8 + 8).to_bytes(8, "little") + b" " * 64,
        (2).to_bytes(8, "little") + b"{]",
        (64).to_bytes(8, "little") + b'{"master|0|1|w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'[:64],
        (63).to_bytes(8, "little") + b'{"master|0|1|w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'[:63],
    ],
)
def test_what_is_no_shard_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(IntegrityError, match="bad is no checkpoint shard"), Reader([tmp_path / "bad"]):
        pass


@pytest.mark.parametrize(
    ("spans", "complete"),
    [
        ([("w", 0, 6)], True),
        ([("w", 4, 2), ("w", 0, 4)], True),
        ([("w", 0, 5)], False),
        ([("w", 0, 7)], False),
        ([("w", 0, 3), ("w", 4, 2)], False),
        ([("w", 0, 6), ("w", 0, 6)], False),
        ([("w", 0, 4), ("w", 3, 3)], False),
        ([], False),
    ],
)
def test_weights_that_are_not_held_exactly_once_are_named(spans: list[tuple[str, int, int]], complete: bool) -> None:
    messages = list(uncovered({"w": (2, 3)}, spans))
    assert (messages == []) == complete
    assert complete or "w [2, 3]" in messages[0]
