"""Remembered hashes: unchanged files are not read again, changed ones always are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipelines.core import fingerprint, hash_memo
from pipelines.core.hash_memo import HashMemo


class Counting:
    """A hash that counts the bytes it has read."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, path: Path) -> str:
        self.bytes += path.stat().st_size
        return fingerprint.hash_file(path)


@pytest.fixture(autouse=True)
def _fine_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests count as old at once."""
    monkeypatch.setattr(hash_memo, "_GRAIN_NS", -(10**12))


def hashed(folder: Path, **options: float) -> tuple[str, int]:
    """Hash `folder/file` with a new memo over the same record; also the bytes read."""
    counting = Counting()
    memo = HashMemo(folder / "memo.json", counting, **options)
    digest = memo.hash(folder / "file")
    memo.save()
    return digest, counting.bytes


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = hashed(tmp_path)
    assert first == (fingerprint.hash_file(file), 3)
    assert hashed(tmp_path) == (first[0], 0)
    file.write_bytes(b"two")
    assert hashed(tmp_path) == (fingerprint.hash_file(file), 3)


def test_a_change_that_puts_size_and_modification_time_back_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    status = file.stat()
    hashed(tmp_path)
    time.sleep(0.02)  # the kernel's clock of files ticks every few milliseconds
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashed(tmp_path) == (fingerprint.hash_file(file), 3)


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_memo, "_GRAIN_NS", 10**12)
    (tmp_path / "file").write_bytes(b"one")
    assert [hashed(tmp_path)[1] for _ in range(2)] == [3, 3]


def test_what_is_too_old_or_damaged_is_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    hashed(tmp_path)
    assert hashed(tmp_path, max_age_s=-1)[1] == 3
    for text in ("", "[]", '{"a": 1}', "{"):
        (tmp_path / "memo.json").write_text(text)
        assert hashed(tmp_path)[1] == 3
    assert hashed(tmp_path)[1] == 0
