"""Checkpoints on real gloo ranks: exact resume, other shardings, damage, full disks, and kills inside a save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.optim.lamb import Lamb
from pipelines.core import artifact
from pipelines.core.errors import ConfigError, IntegrityError
from pipelines.training import snapshot
from pipelines.training.checkpoint import Checkpoints

Run = Callable[..., Any]

SAVE_POINTS = [
    "checkpoint.before_write",
    "checkpoint.mid_shard",
    "checkpoint.after_shards",
    "artifact.after_manifest",
    "artifact.after_rename",
    "checkpoint.during_pruning",
]
LAYOUTS = [
    ("whole", 1),
    ("whole", 2),
    ("flat", 1),
    ("flat", 2),
    ("each", 2),
    ("flat", 3),
    ("each", 3),
    ("flat", 4),
    ("each", 4),
]


@pytest.fixture
def quiet(ranks: Run, tmp_path: Path) -> dict[str, Any]:
    """Eight steps on two ranks that nothing disturbed."""
    result: dict[str, Any] = ranks("train", 2, tmp_path / "quiet", layout="flat", steps=8).result
    return result


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_a_resumed_run_ends_with_the_same_bits(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    half = ranks("train", 2, tmp_path / "run", layout="flat", steps=4).result
    rest = ranks("train", 2, tmp_path / "run", layout="flat", steps=8).result
    assert (half["resumed_at"], rest["resumed_at"]) == (0, 4)
    assert rest["loaded"] == half["final"]
    assert rest["final"] == quiet["final"]
    assert rest["counters"] == quiet["counters"] == dict.fromkeys(quiet["counters"], 8)


def test_the_loop_state_comes_back_with_its_step(ranks: Run, tmp_path: Path) -> None:
    first = ranks("train", 2, tmp_path, layout="flat", steps=4).result
    assert first["saved"] is None
    assert ranks("train", 2, tmp_path, layout="flat", steps=4).result["saved"] == {"step": 4, "note": "at 4"}


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_any_sharding_loads_what_two_sharded_ranks_wrote(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any], layout: str, world: int
) -> None:
    other = ranks("train", world, tmp_path / "quiet", layout=layout, steps=8).result
    assert other["resumed_at"] == 8
    assert other["loaded"] == quiet["final"]
    assert len(other["loaded"]) == 15  # five tensors, each with its master and two moments


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_two_sharded_ranks_load_what_any_sharding_wrote(ranks: Run, tmp_path: Path, layout: str, world: int) -> None:
    written = ranks("train", world, tmp_path, layout=layout, steps=4).result
    assert ranks("train", 2, tmp_path, layout="flat", steps=4).result["loaded"] == written["final"]


def test_ranks_that_hold_the_same_write_it_once(ranks: Run, tmp_path: Path) -> None:
    ranks("train", 2, tmp_path / "whole", layout="whole", steps=2).result  # noqa: B018 - checks the exit codes
    ranks("train", 2, tmp_path / "flat", layout="flat", steps=2).result  # noqa: B018
    sizes = {
        layout: {name: r.size for name, r in artifact.load(tmp_path / layout / "step-00000002").manifest.files.items()}
        for layout in ("whole", "flat")
    }
    assert set(sizes["whole"]) == {"rank-00000.safetensors", "state.json"}
    assert set(sizes["flat"]) == {"rank-00000.safetensors", "rank-00001.safetensors", "state.json"}


@pytest.mark.parametrize("layout", ["flat", "each"])
def test_tensors_without_moments_get_none_back(ranks: Run, tmp_path: Path, layout: str) -> None:
    """LISA: frozen tensors hold no moments, before and after, and their bytes never change."""
    active = ["layers.1.weight", "scale"]
    before = ranks("train", 2, tmp_path, layout=layout, steps=4, active=active).result
    after = ranks("train", 2, tmp_path, layout=layout, steps=6, active=active).result
    with_moments = {name.split("/")[0] for name in after["loaded"] if not name.endswith("/master")}
    assert with_moments == set(active)
    assert after["loaded"] == before["final"]
    assert {name for name in before["final"] if after["final"][name] == before["final"][name]} == {
        f"{name}/master" for name in before["counters"] if name not in active
    }


def test_retention_keeps_the_newest(ranks: Run, tmp_path: Path) -> None:
    done = ranks("train", 2, tmp_path, layout="flat", steps=12, keep=3).result
    assert done["steps"] == [8, 10, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000010", "step-00000012"]


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_keeping_fewer_than_two_is_refused_with_the_reason(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=rf"keep is {keep}; at least 2 .* the newest may"):
        Checkpoints(tmp_path, keep)


def test_a_step_that_is_saved_already_is_left_as_it_is(ranks: Run, tmp_path: Path) -> None:
    ranks("train", 2, tmp_path, layout="flat", steps=4).result  # noqa: B018
    before = (tmp_path / "step-00000002" / "manifest.json").stat().st_mtime_ns
    (tmp_path / "step-00000004").rename(tmp_path / "later")
    ranks("train", 2, tmp_path, layout="flat", steps=2).result  # noqa: B018
    (tmp_path / "later").rename(tmp_path / "step-00000004")
    assert (tmp_path / "step-00000002" / "manifest.json").stat().st_mtime_ns == before


def test_saving_in_the_background_gives_the_same_files(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    """Training goes on while the files are written, and must not be seen in them."""
    slow = [{"point": "checkpoint.mid_shard", "action": "delay", "seconds": 0.2, "rank": r, "nth": 3} for r in (0, 1)]
    done = ranks("train", 2, tmp_path / "run", layout="flat", steps=8, wait=False, faults=slow).result
    assert done["final"] == quiet["final"]
    for step in quiet["steps"]:
        name = f"step-{step:08d}"
        quiet_files, files = (artifact.load(tmp_path / run / name).manifest.files for run in ("quiet", "run"))
        assert files == quiet_files


def test_training_waits_for_the_copy_and_not_for_the_disk(ranks: Run, tmp_path: Path) -> None:
    """Each rank's file takes two seconds; the save in the background gives back control long before."""
    slow = [{"point": "checkpoint.mid_shard", "action": "delay", "seconds": 2.0, "rank": r} for r in (0, 1)]
    done = ranks("train", 2, tmp_path / "behind", layout="flat", steps=2, wait=False, faults=slow).result
    assert done["blocked"] == [False]
    waited = ranks("train", 2, tmp_path / "ahead", layout="flat", steps=2, wait=True, faults=slow).result
    assert waited["blocked"] == [True]


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path: Path, quiet: dict[str, Any]) -> None:
    """Nothing that could be code when it is read."""
    files = [path for path in (tmp_path / "quiet").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert load_file(path)


# ---- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_sigkill_inside_a_save_costs_at_most_that_checkpoint(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any], point: str, wait: bool
) -> None:
    """Rank 0 dies in its third save (of step 6); pruning happens there for the first time, and removes step 2."""
    folder = tmp_path / "run"
    visit = 3 * 7 - 3 if point == "checkpoint.mid_shard" else 1 if point == "checkpoint.during_pruning" else 3
    kill = [{"point": point, "rank": 0, "nth": visit, "action": "SIGKILL"}]
    killed = ranks("train", 2, folder, layout="flat", steps=8, wait=wait, faults=kill)
    assert killed.codes[0] == -9
    assert killed.codes[1] != 0
    published = point in ("artifact.after_rename", "checkpoint.during_pruning")
    assert Checkpoints(folder, 2).steps()[-1] == (6 if published else 4)
    again = ranks("train", 2, folder, layout="flat", steps=8, wait=wait).result
    assert again["resumed_at"] == (6 if published else 4)
    assert again["fallbacks"] == 0
    assert again["final"] == quiet["final"]
    assert temporary(folder) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_of_either_rank_between_saves(ranks: Run, tmp_path: Path, quiet: dict[str, Any], rank: int) -> None:
    kill = [{"point": "train.after_step", "rank": rank, "step": 7, "action": "SIGKILL"}]
    killed = ranks("train", 2, tmp_path / "run", layout="flat", steps=8, faults=kill)
    assert killed.codes[rank] == -9
    again = ranks("train", 2, tmp_path / "run", layout="flat", steps=8).result
    assert again["resumed_at"] == 6
    assert again["final"] == quiet["final"]


def test_sigkill_of_the_other_rank_in_mid_shard(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    kill = [{"point": "checkpoint.mid_shard", "rank": 1, "nth": 20, "action": "SIGKILL"}]
    killed = ranks("train", 2, tmp_path / "run", layout="flat", steps=8, faults=kill)
    assert killed.codes[1] == -9
    again = ranks("train", 2, tmp_path / "run", layout="flat", steps=8).result
    assert 0 < again["resumed_at"] < 8
    assert again["final"] == quiet["final"]
    assert temporary(tmp_path / "run") == []


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any], name: str, damage: str
) -> None:
    path = tmp_path / "quiet" / "step-00000008" / name
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    again = ranks("train", 2, tmp_path / "quiet", layout="flat", steps=8).result
    assert again["resumed_at"] == 6
    assert again["fallbacks"] == 1
    assert again["final"] == quiet["final"]
    assert sorted(p.name for p in (tmp_path / "quiet").iterdir()) == [
        "step-00000006",
        "step-00000008",
        "step-00000008.corrupt",
    ]


def test_damage_found_twice_at_one_step_is_counted_twice(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    for expected in (1, 2):
        flip(tmp_path / "quiet" / "step-00000008" / "rank-00001.safetensors", -1)
        assert ranks("train", 2, tmp_path / "quiet", layout="flat", steps=8).result["fallbacks"] == expected
    assert (tmp_path / "quiet" / "step-00000008.corrupt-2").is_dir()


def test_when_every_checkpoint_is_damaged_nothing_starts_from_zero(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    for step in (6, 8):
        flip(tmp_path / "quiet" / f"step-{step:08d}" / "rank-00000.safetensors", -1)
    for _attempt in range(2):  # the second attempt finds only what the first one set aside
        refused = ranks("train", 2, tmp_path / "quiet", layout="flat", steps=8)
        assert refused.codes == [3, 3]
        assert "every one is damaged" in refused.results[0]["message"]
        assert str(tmp_path / "quiet") in refused.results[1]["message"]
    assert Checkpoints(tmp_path / "quiet", 2).steps() == []


def test_a_bit_that_flips_on_its_way_to_the_disk_is_caught(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    """The hash is of what was meant to be written: it is taken before the file is read back."""
    flipped = [{"point": "checkpoint.after_shard", "rank": 1, "nth": 4, "action": "flip"}]
    ranks("train", 2, tmp_path / "run", layout="flat", steps=8, faults=flipped).result  # noqa: B018
    again = ranks("train", 2, tmp_path / "run", layout="flat", steps=8).result
    assert (again["resumed_at"], again["fallbacks"]) == (6, 1)
    assert again["final"] == quiet["final"]


def test_a_checkpoint_of_another_model_is_refused(ranks: Run, tmp_path: Path, quiet: dict[str, Any]) -> None:
    folder = tmp_path / "quiet" / "step-00000008"
    content = json.loads((folder / "state.json").read_text())
    content["shapes"]["scale"] = [2]
    found = artifact.load(folder)
    build = tmp_path / "build"
    folder.rename(build)
    (build / "manifest.json").unlink()
    (build / "state.json").write_text(json.dumps(content))
    artifact.publish(
        build, folder, stage="checkpoint", node="pretrain", identity=found.manifest.identity, parents={}, summary={}
    )
    refused = ranks("train", 2, tmp_path / "quiet", layout="flat", steps=8)
    assert refused.codes == [3, 3]
    assert "of another model: scale is [1], saved was [2]" in refused.results[0]["message"]


# ---- no space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_tried_once_more_without_the_older_checkpoints(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any], rank: int
) -> None:
    full = [{"point": "checkpoint.mid_shard", "rank": rank, "nth": 30, "action": "ENOSPC"}]
    done = ranks("train", 2, tmp_path / "run", layout="flat", steps=8, keep=3, faults=full).result
    assert done["final"] == quiet["final"]
    assert done["steps"][-1] == 8
    assert 2 not in done["steps"]  # pruned to make room, though keep = 3 would have held it
    assert temporary(tmp_path / "run") == []


def test_a_disk_that_stays_full_ends_with_the_numbers_and_the_older_checkpoint(
    ranks: Run, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    full = [{"point": "checkpoint.after_shards", "step": 6, "action": "ENOSPC"}] * 2
    ended = ranks("train", 2, tmp_path / "run", layout="flat", steps=8, faults=full)
    assert ended.codes == [4, 4]
    for result in ended.results:
        assert "no space for the checkpoint of step 6" in result["message"]
        assert "it needs 780 bytes" in result["message"]
    assert temporary(tmp_path / "run") == []
    again = ranks("train", 2, tmp_path / "run", layout="flat", steps=8).result
    assert again["resumed_at"] == 4
    assert again["final"] == quiet["final"]


def test_a_crash_on_one_rank_inside_a_save_is_told_to_the_others(ranks: Run, tmp_path: Path) -> None:
    crash = [{"point": "checkpoint.mid_shard", "rank": 1, "nth": 2, "action": "raise"}]
    ended = ranks("train", 2, tmp_path, layout="flat", steps=8, faults=crash)
    assert ended.codes == [1, 1]
    assert "InjectedFaultError" in ended.results[1]["message"]
    assert "failed on rank 1; see its log" in ended.results[0]["message"]


def test_a_checkpoint_is_published_while_the_last_writer_is_held_up_behind_its_note(ranks: Run, tmp_path: Path) -> None:
    """Rank 0 renames the folder as soon as it sees all notes: their writers touch nothing in it after that."""
    late = [{"point": "artifact.after_replace", "action": "delay", "seconds": 2.0, "rank": 1}]
    done = ranks("train", 2, tmp_path, layout="flat", steps=4, wait=False, faults=late).result
    assert done["steps"] == [2, 4]


def test_a_checkpoint_of_another_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / snapshot.STATE).write_text(json.dumps({"format": snapshot.FORMAT - 1}))
    names: dict[str, Any] = {"stage": "checkpoint", "node": "pretrain", "identity": {}, "parents": {}, "summary": {}}
    older = artifact.publish(tmp_path / "build", tmp_path / "checkpoints" / "step-00000005", **names)
    with pytest.raises(IntegrityError, match=f"has format {snapshot.FORMAT - 1}; this program reads") as refused:
        snapshot.restore(older, Lamb([nn.Parameter(torch.ones(1))]))
    assert str(tmp_path / "checkpoints") in str(refused.value.hint)
