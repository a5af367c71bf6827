"""Compressed bytes as a stream of plain ones, bounded in memory and in what they may expand to.

What a file is compressed with is told by its first bytes, never by its name. gzip, zstd, bzip2, xz and lzma are read
with all their members, frames or streams and the zeros that tapes and block devices pad them with.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import zstandard
from backports import zstd

from pipelines.core.errors import IntegrityError

_OUT_BYTES = 1 << 16
"""Plain bytes taken out of a decompressor at a time."""
_HEADER_BYTES = 18
"""Longest header of a zstd frame."""
_FREE_BYTES = 64 << 20
"""What any file may expand to."""
_ZSTD_MAX_WINDOW_LOG = 31


class DamagedError(ValueError):
    """A compressed file cannot be read to its end; the message says why."""


class _Member(Protocol):
    """One compressed stream, as the standard library's bz2 and lzma decompress it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


class _Gzip:
    """A gzip member with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)
        self.eof = self.needs_input = False
        self.unused_data = b""

    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max(max_length, 0))
        self.eof, self.unused_data = self._zlib.eof, self._zlib.unused_data
        self.needs_input = not self.eof and not self._zlib.unconsumed_tail and len(out) < max_length
        return out


@dataclass(frozen=True)
class Limits:
    """How far a compressed file is followed."""

    max_expansion: int = 2000
    """Plain bytes for each compressed one, beyond the first 64 MiB."""
    max_window_bytes: int = 128 << 20
    """Memory of a decompressor."""


def compression(head: bytes) -> str | None:
    """Return what the first bytes of a file are compressed with; None for plain ones."""
    if head[:5] == b"\x5d\x00\x00\x80\x00" or (head[:3] == b"\x5d\x00\x00" and head[5:13] == b"\xff" * 8):
        return "lzma"
    if head.startswith(b"BZh") and head[4:10] not in {b"1AY&SY", b"\x17rE8P\x90"}:
        return None  # a text may begin so
    skippable = len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F
    if skippable:
        return "zstd"
    return next((name for name, magic in _MAGIC.items() if head.startswith(magic)), None)


def expand(raw: Iterator[bytes], method: str, name: str, limits: Limits) -> Iterator[bytes]:
    """Yield the plain bytes of a compressed stream, in pieces of at most 64 KiB.

    Args:
        raw: the compressed bytes.
        method: what `compression` called them.
        name: of the file, for messages.
        limits: how far it is followed.

    Raises:
        DamagedError: the stream is cut, or is not what it began as.
        IntegrityError: it needs more memory or expands further than the limits allow.
    """
    taken = expanded = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for chunk in raw:
            taken += len(chunk)
            yield chunk

    for out in _members(counted(), method, name, limits):
        expanded += len(out)
        if expanded > max(_FREE_BYTES, taken * limits.max_expansion):
            raise IntegrityError(
                f"{name} expands to more than {limits.max_expansion:,} times its size: {taken:,} bytes of {method} "
                f"gave {expanded:,} and go on",
                hint=f"if it is meant to, raise prepare.max_expansion ({limits.max_expansion}); else remove it",
            )
        yield out


def _members(raw: Iterator[bytes], method: str, name: str, limits: Limits) -> Iterator[bytes]:
    data = _filled(b"", raw)
    while data:
        window = _window(data) if method == "zstd" else 0
        member = _OPEN[method](limits)
        given = 0
        while True:
            out = _decompress(member, data, name, limits)
            data = b""
            given += len(out)
            if min(window, given) > limits.max_window_bytes:
                raise _too_much_memory(name, window, limits)
            if out:
                yield out
            if member.eof:
                break
            if member.needs_input and not (data := next(raw, b"")):
                raise DamagedError("it ends in the middle")
        data = _filled(member.unused_data, raw)
        if data and compression(data) != method:
            raise DamagedError(f"after its end there is something that is no {method}")


def _decompress(member: _Member, data: bytes, name: str, limits: Limits) -> bytes:
    try:
        return member.decompress(data, max_length=_OUT_BYTES)
    except lzma.LZMAError as error:
        if "limit" in str(error):
            raise _too_much_memory(name, 1 << 30, limits) from None
        raise DamagedError(str(error)) from None
    except (zlib.error, zstd.ZstdError, EOFError, OSError) as error:
        raise DamagedError(str(error)) from None


def _filled(data: bytes, raw: Iterator[bytes]) -> bytes:
    """Return what comes next, padding of zeros left out, long enough to tell a header; empty at the end."""
    data = data.lstrip(b"\0")
    while len(data) < _HEADER_BYTES and (more := next(raw, b"")):
        data = (data + more).lstrip(b"\0")
    return data


def _window(data: bytes) -> int:
    """Return the bytes that the decoder of a zstd frame must keep."""
    try:
        return int(zstandard.get_frame_parameters(data[:_HEADER_BYTES]).window_size)
    except zstandard.ZstdError:
        return 0  # the decompressor says what is wrong


def _too_much_memory(name: str, wanted: int, limits: Limits) -> IntegrityError:
    return IntegrityError(
        f"{name} takes up to {wanted:,} bytes of memory to decompress; prepare.max_window_bytes allows "
        f"{limits.max_window_bytes:,}",
        hint=f"prepare.max_window_bytes={wanted} reads it; or compress it again (`zstd --long=27`, `xz -6`)",
    )


def _zstd() -> _Member:
    # The window is memory only as far as it is filled, and `_members` watches that.
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_MAX_WINDOW_LOG})


_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
_OPEN: dict[str, Callable[[Limits], _Member]] = {
    "gzip": lambda _: _Gzip(),
    "zstd": lambda _: _zstd(),
    "bzip2": lambda _: bz2.BZ2Decompressor(),
    "xz": lambda limits: lzma.LZMADecompressor(memlimit=limits.max_window_bytes),
    "lzma": lambda limits: lzma.LZMADecompressor(memlimit=limits.max_window_bytes),
}
