"""Files of ranks on nodes that share no disk: a server of one folder, and the program of another node that arrives."""

from __future__ import annotations

import dataclasses
import errno
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import node_files
from pipelines.core.errors import ConfigError, TransientError
from pipelines.core.node_files import FirstNode, Workplace
from pipelines.core.store import LocalStore
from tests.conftest import Disk

HOST = "127.0.0.1"


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A folder of the first node's store with a file that tells ranks where things are."""
    root = LocalStore(tmp_path / "first").root
    folder = root / "scratch" / "pretrain-1"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"scratch": str(folder), "weights": f"{root}/artifacts/fetch/x"}))
    return Workplace(folder, root, ("spec.json", "none.json"))


@pytest.fixture
def told(workplace: Workplace) -> Iterator[dict[str, Any]]:
    """What the first node tells of the folder while it serves it."""
    with node_files.serving(workplace, HOST) as told:
        yield told


@pytest.fixture
def first(told: dict[str, Any], tmp_path: Path) -> FirstNode:
    """The first node, seen from one with another folder."""
    return FirstNode(told["address"], told["port"], told["token"], tmp_path / "other")


def test_files_come_and_go_whole(first: FirstNode, workplace: Workplace, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20_000)
    first.put(source, first.folder / "a b" / "rank-1#.bin")
    assert (workplace.folder / "a b" / "rank-1#.bin").read_bytes() == source.read_bytes()
    assert first.get(first.folder / "a b" / "rank-1#.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert not first.get(first.folder / "nothing", tmp_path / "nothing")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "stale").touch()
    first.get_folder(first.folder / "a b", tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["rank-1#.bin"]
    assert [path.name for path in (workplace.folder / "a b").iterdir()] == ["rank-1#.bin"]


def test_a_stranger_and_a_name_outside_of_the_folder_are_refused(first: FirstNode, workplace: Workplace) -> None:
    stranger = dataclasses.replace(first, token="0" * 64)
    with pytest.raises(TransientError, match="answers 403"):
        stranger.get(first.folder / "spec.json", first.folder.with_name("got"))
    (workplace.root / "secret").write_text("x")
    connection = http.client.HTTPConnection(HOST, first.port, timeout=10)
    for name in ("/../../secret", "/%2e%2e/%2e%2e/secret"):
        connection.request("GET", name, headers={"Authorization": first.token})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 403
    connection.close()


def test_a_full_disk_of_the_first_node_is_told_as_a_full_disk(disk_of: Callable[[int], Disk], tmp_path: Path) -> None:
    root = LocalStore(disk_of(256).path).root
    (root / "scratch").mkdir()
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1_000_000)
    with node_files.serving(Workplace(root / "scratch", root, ()), HOST) as told:
        first = FirstNode(told["address"], told["port"], told["token"], tmp_path)
        with pytest.raises(OSError, match="disk is full") as caught:
            first.put(source, tmp_path / "big")
    assert caught.value.errno == errno.ENOSPC
    assert list((root / "scratch").iterdir()) == []


def test_a_first_node_that_is_gone_is_a_fault_that_may_pass(workplace: Workplace, tmp_path: Path) -> None:
    with node_files.serving(workplace, HOST) as told:
        first = FirstNode(told["address"], told["port"], told["token"], tmp_path)
    with pytest.raises(TransientError, match="does not answer"):
        first.get(tmp_path / "spec.json", tmp_path / "got")
    assert [path.name for path in workplace.folder.iterdir()] == ["spec.json"]


def test_who_sees_the_disk_carries_nothing(told: dict[str, Any], workplace: Workplace) -> None:
    log_dir = str(workplace.folder / "logs")
    here = node_files.arrive({"command": ["a", "b"], "log_dir": log_dir, "env": {"A": "1"}, "workplace": told})
    assert (here.command, str(here.log_dir), here.env) == (("a", "b"), log_dir, {"A": "1"})


def test_without_a_shared_disk_a_store_in_a_folder_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    elsewhere = {**told, "store": str(tmp_path / "second")}
    with pytest.raises(ConfigError, match=r"does not see .*/second/scratch/pretrain-1 of the first node"):
        node_files.arrive({"command": ["a"], "log_dir": "/", "env": {}, "workplace": elsewhere})


def test_the_cache_of_a_machine_may_be_named_by_a_variable(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.core.object_store import ObjectStore

    monkeypatch.setenv("NODE_NAME", "n7")
    monkeypatch.setenv("INGOT_CACHE", f"{tmp_path}/$NODE_NAME/cache")
    assert ObjectStore(s3_store).root.parent == tmp_path / "n7" / "cache"
