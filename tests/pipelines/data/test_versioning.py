"""Versioning with real DVC and git: which corpus, whether it is intact, and how it comes back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core import hash_memo
from pipelines.core.errors import ConfigError, IntegrityError, LockedError
from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data import dvc, reader, recording, versioning
from pipelines.data.config import DataConfig
from pipelines.data.records import Document

HERE = DataConfig()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def flip(path: Path, position: int = 1000) -> None:
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


@pytest.fixture
def checkout(clone: Path, corpus: Path) -> Path:
    """A clone with its corpus in place, without a DVC cache: what hashing alone has to work with."""
    shutil.copytree(corpus, clone / "data")
    return clone


def small_corpus(folder: Path, text: str) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "a.jsonl").write_text(json.dumps({"id": "a", "text": text}) + "\n", encoding="utf-8")


# ---- identity


def test_the_hash_of_the_bundled_corpus_is_the_one_that_dvc_computes(checkout: Path) -> None:
    assert versioning.hash_tree(versioning.hash_files(checkout / "data")) == versioning.data_hash(HERE, checkout)


def test_the_hash_is_known_in_milliseconds_without_any_data(clone: Path) -> None:
    started = time.perf_counter()
    assert versioning.data_hash(HERE, clone).endswith(".dir")
    assert time.perf_counter() - started < 0.2


def test_a_folder_with_subfolders_and_odd_names_hashes_as_dvc_does(
    clone: Path, dvc_command: Callable[..., str]
) -> None:
    for name in ("a b.jsonl", "sub/é.jsonl", "sub.jsonl", "Z/z.jsonl", "a/0.jsonl"):
        (clone / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "data" / name).write_text(name, encoding="utf-8")
    dvc_command(clone, "dvc", "add", "--quiet", "data")
    assert versioning.hash_tree(versioning.hash_files(clone / "data")) == versioning.data_hash(HERE, clone)


@pytest.mark.parametrize("text", ["", "outs: 5", "outs:\n- path: other\n  md5: x\n", "{", "outs:\n- path: data\n"])
def test_a_dvc_file_that_does_not_track_the_corpus_is_a_configuration_error(clone: Path, text: str) -> None:
    (clone / "data.dvc").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.dvc does not track 'data' by md5"):
        versioning.data_hash(HERE, clone)


def test_a_missing_dvc_file_and_an_unknown_revision_are_configuration_errors(clone: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.rev = 'v9'.*invalid object name") as caught:
        versioning.data_hash(DataConfig(rev="v9"), clone)
    assert "git fetch --tags" in str(caught.value.hint)
    (clone / "data.dvc").unlink()
    with pytest.raises(ConfigError, match=r"data\.dvc does not exist"):
        versioning.data_hash(HERE, clone)


# ---- integrity


def test_a_flipped_byte_is_refused_naming_the_file_both_hashes_and_the_repair(checkout: Path) -> None:
    victim = checkout / "data" / "milton.jsonl.zst"
    right = md5(victim)
    flip(victim)
    with pytest.raises(IntegrityError, match="is not the corpus that was recorded") as caught:
        versioning.verify(HERE, checkout)
    assert caught.value.exit_code == 3
    assert f"{victim}: expected md5 {right}, found {md5(victim)}" in caught.value.message
    assert "bible" not in caught.value.message
    assert "ingot data pull --force" in str(caught.value.hint)


def test_a_corpus_is_read_once_until_a_file_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rerun over 20 GB must not read them: the second verification reads no byte."""
    monkeypatch.setattr(hash_memo, "_GRAIN_NS", -(10**12))
    read: list[Path] = []
    hash_file = versioning._md5
    monkeypatch.setattr(versioning, "_md5", lambda path: read.append(path) or hash_file(path))
    first = versioning.verify(HERE, checkout)
    assert {path.name for path in read if path.parent == first.path} == set(first.md5)
    read.clear()
    assert versioning.verify(HERE, checkout) == first
    assert read == []
    assert versioning.verify(HERE, checkout, reread=True) == first
    assert len(read) == len(first.md5)
    flip(checkout / "data" / "milton.jsonl.zst")
    with pytest.raises(IntegrityError, match=r"milton\.jsonl\.zst: expected md5"):
        versioning.verify(HERE, checkout)


def test_missing_and_unknown_files_are_named(checkout: Path) -> None:
    (checkout / "data" / "milton.jsonl.zst").unlink()
    (checkout / "data" / "extra.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError) as caught:
        versioning.verify(HERE, checkout)
    assert "extra.jsonl: expected md5 (none)" in caught.value.message
    assert "milton.jsonl.zst: expected md5" in caught.value.message
    assert "found (missing)" in caught.value.message


def test_a_changed_data_dvc_is_refused_even_when_nobody_knows_its_files(checkout: Path) -> None:
    recorded = (checkout / "data.dvc").read_text(encoding="utf-8")
    old = versioning.data_hash(HERE, checkout)
    (checkout / "data.dvc").write_text(recorded.replace(old, "0" * 32 + ".dir"), encoding="utf-8")
    with pytest.raises(IntegrityError, match=f"expected md5 {'0' * 32}.dir, found {old}"):
        versioning.verify(HERE, checkout)


def test_missing_files_are_refused_with_the_command_that_brings_them(clone: Path) -> None:
    with pytest.raises(IntegrityError, match="does not exist") as caught:
        versioning.verify(HERE, clone)
    assert "ingot data pull" in str(caught.value.hint)


# ---- files for a run


def test_a_fresh_clone_gets_its_corpus_from_the_remote_inside_it(clone: Path, tmp_path: Path) -> None:
    found = versioning.checkout_corpus(HERE, tmp_path / "scratch", clone)
    assert found.path == clone / "data"
    assert found.hash == versioning.data_hash(HERE, clone)
    assert sorted(found.md5) == sorted(path.name for path in found.path.iterdir())
    records = list(reader.read(found.path, md5=found.md5))
    assert len(records) > 2000
    assert all(isinstance(record, Document) for record in records)


def test_ensure_never_touches_a_corpus_that_is_there(checkout: Path) -> None:
    flip(checkout / "data" / "milton.jsonl.zst")
    before = versioning.hash_files(checkout / "data")
    versioning.ensure(HERE, checkout)
    assert versioning.hash_files(checkout / "data") == before
    with pytest.raises(IntegrityError):
        versioning.checkout_corpus(HERE, checkout / "scratch", checkout)


def test_a_revision_gives_the_corpus_as_it_was_then_and_leaves_the_work_tree_alone(
    clone: Path, tmp_path: Path, dvc_command: Callable[..., str], commit: Callable[[Path, str], None]
) -> None:
    small_corpus(clone, "the first version")
    recording.add(HERE, clone)
    versioning.push(HERE, clone, into_git=True)
    commit(clone, "first")
    dvc_command(clone, "git", "tag", "v1")
    small_corpus(clone, "the second version")
    recording.add(HERE, clone)
    commit(clone, "second")
    shutil.rmtree(clone / ".dvc" / "cache")
    old = DataConfig(rev="v1")
    assert versioning.data_hash(old, clone) != versioning.data_hash(HERE, clone)
    found = versioning.checkout_corpus(old, tmp_path / "scratch", clone)
    assert found.hash == versioning.data_hash(old, clone)
    assert "the first version" in (found.path / "a.jsonl").read_text(encoding="utf-8")
    assert "the second version" in (clone / "data" / "a.jsonl").read_text(encoding="utf-8")
    assert dvc_command(clone, "git", "status", "--porcelain") == ""
    assert versioning.checkout_corpus(old, tmp_path / "scratch", clone) == found
    (found.path / "a.jsonl").write_text("tampered", encoding="utf-8")
    with pytest.raises(IntegrityError, match="found"):
        versioning.checkout_corpus(old, tmp_path / "scratch", clone)


def test_a_revision_whose_files_are_gone_says_so(
    clone: Path, tmp_path: Path, commit: Callable[[Path, str], None]
) -> None:
    small_corpus(clone, "never pushed")
    recording.add(HERE, clone)
    commit(clone, "never pushed")
    shutil.rmtree(clone / ".dvc" / "cache")
    with pytest.raises(IntegrityError, match="not in the DVC cache or remote") as caught:
        versioning.checkout_corpus(DataConfig(rev="HEAD"), tmp_path / "scratch", clone)
    assert "ingot data push" in str(caught.value.hint)


# ---- `ingot data ...`


def test_pull_keeps_edited_files_unless_forced_and_status_tells_when_all_is_well(checkout: Path) -> None:
    flip(checkout / "data" / "milton.jsonl.zst")
    edited = md5(checkout / "data" / "milton.jsonl.zst")
    with pytest.raises(IntegrityError, match="were edited and would be lost"):
        versioning.pull(HERE, checkout)
    assert md5(checkout / "data" / "milton.jsonl.zst") == edited
    assert "ingot data pull --force" in versioning.status(HERE, checkout)["do"]
    assert versioning.pull(HERE, checkout, force=True)["files"] == 4
    found = versioning.status(HERE, checkout)
    assert found["hash"] == versioning.data_hash(HERE, checkout)
    assert found["bytes"] == sum(path.stat().st_size for path in (checkout / "data").iterdir())
    assert found["files"] == 4
    assert (found["work_tree"], found["remote"]) == ("matches", "up to date")
    assert "do" not in found


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_or_missing_object_in_the_remote_is_refused_by_name(clone: Path, damage: str) -> None:
    objects = (path for path in (clone / "infra" / "dvc-remote").rglob("*") if path.is_file())
    victim = max(objects, key=lambda path: path.stat().st_size)
    right = md5(victim)
    if damage == "flipped":
        flip(victim)
    else:
        victim.unlink()
    found = md5(victim) if damage == "flipped" else "(missing)"
    with pytest.raises(IntegrityError) as caught:
        versioning.pull(HERE, clone)
    assert f"shakespeare.jsonl.zst = {victim}: expected md5 {right}, found {found}" in caught.value.message


def test_a_damaged_cache_is_never_taken_for_the_corpus(clone: Path) -> None:
    """DVC trusts its cache without hashing it again; the verification after every pull does not."""
    versioning.pull(HERE, clone)
    cached = (path for path in (clone / ".dvc" / "cache").rglob("*") if path.is_file())
    victim = max(cached, key=lambda path: path.stat().st_size)
    flip(victim)
    # A read-only object is one that DVC wrote and trusts.
    victim.chmod(0o444)
    shutil.rmtree(clone / "data")
    with pytest.raises(IntegrityError, match=r"shakespeare\.jsonl\.zst: expected md5") as caught:
        versioning.pull(HERE, clone)
    assert "delete .dvc/cache" in str(caught.value.hint)


def test_add_records_an_edited_corpus_and_import_brings_one_from_a_path(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_corpus(clone, "edited")
    before = versioning.data_hash(HERE, clone)
    added = recording.add(HERE, clone)
    assert added["hash"] == versioning.data_hash(HERE, clone) != before
    assert added["files"] == 1
    with pytest.raises(ConfigError, match="exists and would be replaced"):
        recording.import_url(HERE, clone, str(tmp_path / "elsewhere"))
    small_corpus(tmp_path, "from elsewhere")
    shutil.rmtree(clone / "data")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")  # a path that is typed starts here
    imported = recording.import_url(HERE, clone, "../data")
    assert imported["hash"] == versioning.verify(HERE, clone).hash
    assert "from elsewhere" in (clone / "data" / "a.jsonl").read_text(encoding="utf-8")


def test_a_text_that_joins_an_older_corpus_does_not_do_so_in_silence(checkout: Path) -> None:
    (checkout / "data" / "mine.jsonl").write_text('{"text": "mine"}\n')
    (checkout / "data" / "scan.pdf").write_bytes(b"%PDF-1.4")
    added = recording.add(HERE, checkout)
    assert added["added"] == "mine.jsonl, scan.pdf"
    assert added["not read"] == "scan.pdf: a PDF (extract its text (`pdftotext`))"
    assert "shakespeare.jsonl.zst" in added["kept"]


def test_adding_nothing_and_importing_from_nowhere_are_refused(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        recording.add(HERE, clone)
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        recording.import_url(HERE, clone, str(tmp_path / "nowhere"))
    assert versioning.data_hash(HERE, clone) == versioning.data_hash(HERE, CHECKOUT)


def test_two_commands_at_once_queue_and_both_succeed(clone: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pipelines.data import config, versioning;"
        "versioning.pull(config.DataConfig(), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    pulls = [subprocess.Popen([sys.executable, "-c", script, str(clone)], env=environment) for _ in range(2)]
    assert [pull.wait(timeout=60) for pull in pulls] == [0, 0]
    versioning.verify(HERE, clone)


def test_a_foreign_dvc_command_that_keeps_the_lock_is_named_after_the_deadline(clone: Path) -> None:
    script = (
        "import sys; from dvc.repo import Repo\nwith Repo('.').lock:\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=clone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="another DVC command has held the lock"):
            dvc.run(clone, "pull", "data.dvc", lock_wait_s=0.1)
        holder.communicate("")


def test_the_bundled_configuration_verifies_downloads_and_reports_to_nobody(clone: Path) -> None:
    shown = dvc.run(clone, "config", "--list", "--project").splitlines()
    assert {"remote.bundled.verify=true", "core.analytics=false", "core.autostage=false", "core.remote=bundled"} <= set(
        shown
    )


def test_without_git_the_way_out_is_named(clone: Path) -> None:
    shutil.rmtree(clone / ".git")
    small_corpus(clone, "text")
    with pytest.raises(ConfigError, match="no git repository") as caught:
        recording.add(HERE, clone)
    assert "git init" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "said"), [("<<<<<<< HEAD\nouts:\n=======\n>>>>>>> x\n", "merge conflict"), ("", "empty")]
)
def test_a_dvc_file_in_conflict_or_empty_says_so(clone: Path, text: str, said: str) -> None:
    (clone / "data.dvc").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        versioning.data_hash(HERE, clone)
    assert "git checkout" in str(caught.value.hint)
