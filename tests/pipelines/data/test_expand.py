"""Decompression is bounded in memory and in what it may expand to, and says which setting lets it go on."""

from __future__ import annotations

import gzip
import io
import lzma
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines.core.errors import IntegrityError
from pipelines.core.program import ROOT
from pipelines.data import expand, reader
from pipelines.data.config import PrepareConfig

MIB = 1 << 20


def bomb(megabytes: int, window_log: int = 0) -> bytes:
    """A zstd frame of one line of that many MiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, **({"window_log": window_log} if window_log else {}))
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    parts = [packer.compress(b"x" * MIB) for _ in range(megabytes)]
    return b"".join([*parts, packer.flush()])


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([zstandard.compress(b'{"text": "x"}\n'), bomb(3000)]))
    code = (
        "import resource, sys; from pathlib import Path; from pipelines.data import reader\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try:\n    list(reader.read(Path(sys.argv[1])))\n"
        "except Exception as error:\n    print(error)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    *said, grown = done.stdout.splitlines()
    assert "expands to more than 2,000 times its size" in said[0], done
    assert "prepare.max_expansion" in said[-1]
    assert int(grown) < 50_000, "KiB"


def test_what_may_expand_does(tmp_path: Path) -> None:
    text = b'{"text": "%s"}\n' % (b"x" * (80 * MIB))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "y"}\n' + text))
    with pytest.raises(IntegrityError, match="expands to more than"):
        list(reader.read(tmp_path))
    records = list(reader.read(tmp_path, PrepareConfig(max_expansion=10**6)))
    assert len(records) == 2


def test_a_long_window_is_read_while_it_fits_and_named_when_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(bomb(0, window_log=31) + bomb(1, window_log=31))
    limits = expand.Limits(max_window_bytes=MIB // 2)
    raw = (tmp_path / "a.jsonl.zst").read_bytes()
    assert sum(map(len, expand.expand(iter([raw]), "zstd", "a", expand.Limits()))) == MIB
    with pytest.raises(
        IntegrityError, match=r"2,147,483,648 bytes.*prepare\.max_window_bytes allows 524,288"
    ) as caught:
        list(expand.expand(iter([raw]), "zstd", "a", limits))
    assert "prepare.max_window_bytes=2147483648 reads it" in str(caught.value.hint)


def test_xz_that_needs_more_memory_than_allowed_says_so() -> None:
    raw = lzma.compress(b"x" * 1000, preset=9)
    with pytest.raises(IntegrityError, match=r"prepare\.max_window_bytes"):
        list(expand.expand(iter([raw]), "xz", "a", expand.Limits(max_window_bytes=MIB)))
    assert b"".join(expand.expand(iter([raw]), "xz", "a", expand.Limits())) == b"x" * 1000


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("method", ["gzip", "zstd", "xz"])
def test_members_are_read_however_the_stream_is_cut(method: str, chunk: int) -> None:
    pack = {"gzip": gzip.compress, "zstd": zstandard.compress, "xz": lzma.compress}[method]
    parts = [bytes(range(256)) * n for n in (1, 0, 300)]
    raw = b"".join(pack(part) + bytes(4) for part in parts)
    cut = (raw[start : start + chunk] for start in range(0, len(raw), chunk))
    assert expand.compression(raw) == method
    assert b"".join(expand.expand(cut, method, "a", expand.Limits())) == b"".join(parts)


@pytest.mark.parametrize(("cut", "reason"), [(slice(0, -3), "ends in the middle"), (slice(None), "is no gzip")])
def test_what_is_cut_or_followed_by_something_else_is_damaged(cut: slice, reason: str) -> None:
    raw = gzip.compress(b"x" * 100)[cut] + (b"garbage" if cut == slice(None) else b"")
    found: list[bytes] = []
    with pytest.raises(expand.DamagedError, match=reason):
        found.extend(expand.expand(iter([raw]), "gzip", "a", expand.Limits()))


def test_a_table_whose_pages_expand_without_bound_is_refused_unread(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (8 * MIB)] * 40})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IntegrityError, match=r"(?s)column text expands from .*prepare\.max_expansion"):
        list(reader.read(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_repeated_texts_of_a_table_do_not_add_up(tmp_path: Path) -> None:
    """A dictionary of one text of 1 MiB in 500 rows is 1 MiB of file and of memory."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["y" * MIB] * 500}), out)
    (tmp_path / "t.parquet").write_bytes(out.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in reader.read(tmp_path)) == 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000
