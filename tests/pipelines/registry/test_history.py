"""The history of champions: append-only, tolerant of cuts, and enough to say who stood when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.registry import history
from pipelines.registry.history import OBSERVED, PROMOTE, REFUSED, ROLLBACK


def write(root: Path, *moves: tuple[str, str | None]) -> None:
    """Append (action, version) records."""
    for action, version in moves:
        history.append(root, "m", action, version=version, why="test", fingerprint=f"print {version}")


def test_without_a_history_there_is_no_champion(tmp_path: Path) -> None:
    assert history.champion(tmp_path, "m") is None
    assert history.read(tmp_path) == []
    assert history.models(tmp_path) == []


@pytest.mark.parametrize(
    ("moves", "line"),
    [
        ([(PROMOTE, "1"), (PROMOTE, "2")], ["1", "2"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (ROLLBACK, "1")], ["1"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (PROMOTE, "3"), (ROLLBACK, "2"), (ROLLBACK, "1")], ["1"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (ROLLBACK, "1"), (PROMOTE, "3")], ["1", "3"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (OBSERVED, "1")], ["1"]),
        ([(PROMOTE, "1"), (OBSERVED, "9")], ["1", "9"]),
        ([(PROMOTE, "1"), (OBSERVED, None)], ["1", None]),
        ([(PROMOTE, "1"), (OBSERVED, None), (OBSERVED, "1")], ["1"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (OBSERVED, None), (ROLLBACK, "1")], ["1"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (PROMOTE, "3"), (ROLLBACK, "1")], ["1"]),
        ([(PROMOTE, "1"), (REFUSED, None)], ["1"]),
        ([(PROMOTE, "1"), (PROMOTE, "2"), (PROMOTE, "1")], ["1", "2", "1"]),
    ],
)
def test_the_line_of_champions_follows_every_move(
    tmp_path: Path, moves: list[tuple[str, str | None]], line: list[str | None]
) -> None:
    write(tmp_path, *moves)
    assert [record["version"] for record in history.champions(tmp_path, "m")] == line


def test_a_record_cut_short_is_left_out_and_the_next_one_stays_whole(tmp_path: Path) -> None:
    write(tmp_path, (PROMOTE, "1"), (PROMOTE, "2"))
    path = tmp_path / history.HISTORY
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, (PROMOTE, "3"))
    assert [record["version"] for record in history.read(tmp_path, "m")] == ["1", "3"]


def test_models_do_not_mix(tmp_path: Path) -> None:
    history.append(tmp_path, "a", PROMOTE, version="1", why="x", fingerprint="f1")
    history.append(tmp_path, "b", PROMOTE, version="7", why="x", fingerprint="f2")
    history.append(tmp_path, "c", REFUSED, version=None, why="x", fingerprint="f3")
    champion = history.champion(tmp_path, "a")
    assert champion is not None
    assert champion["version"] == "1"
    assert history.models(tmp_path) == ["a", "b"]
    assert history.fingerprints(tmp_path) == {"f1", "f2"}


def test_a_record_says_who_when_and_why(tmp_path: Path) -> None:
    record = history.append(tmp_path, "m", PROMOTE, version="1", why="beats the champion", bits_per_byte=1.9)
    (line,) = (tmp_path / history.HISTORY).read_text().splitlines()
    assert json.loads(line) == record
    assert "@" in record["who"]
    assert record["time"].endswith("+00:00")
    assert (record["why"], record["bits_per_byte"]) == ("beats the champion", 1.9)


def test_no_secret_is_written_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "c4n4ry-Zq81")
    checks = [{"name": "beats c4n4ry-Zq81"}]
    record = history.append(
        tmp_path, "m", history.REFUSED, version=None, why="c4n4ry-Zq81", decision={"checks": checks}
    )
    assert record["why"] == "***"
    assert record["decision"]["checks"][0]["name"] == "beats ***"
    assert "c4n4ry" not in (tmp_path / history.HISTORY).read_text()
