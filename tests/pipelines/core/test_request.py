"""Requests: a node is executed from JSON alone, by this process or any other, to the same artifact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import recipe, run_plan
from pipelines.core import fingerprint, run_stage
from pipelines.core.errors import ConfigError, IngotError
from pipelines.core.request import ArtifactRef, StageRequest
from pipelines.core.stage import Progress
from pipelines.core.store import LocalStore
from tests.pipelines.core.toy_stages import request

CHECKOUT = Path(__file__).resolve().parents[3]


def start(request: StageRequest, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Execute a request in another process, from another working directory."""
    folder.mkdir(exist_ok=True)
    (folder / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "pipelines.core.run_stage", *(arguments or ("request.json",))]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("name", recipe.names())
def test_every_node_of_every_recipe_keeps_its_identity_through_json(name: str) -> None:
    plan = run_plan.make(name, elsewhere=True)  # some need more memory than this machine has
    for node in plan.graph:
        read = StageRequest.model_validate_json(plan.request(node).model_dump_json())
        config = read.described().configured(read.configuration)
        assert fingerprint.digest(read.described().identity(config, read.input_keys())) == plan.graph[node].fingerprint
        assert config.model_dump() == plan.graph[node].node.config.model_dump()


def test_another_process_makes_the_same_artifact_from_another_folder(tmp_path: Path) -> None:
    seen: list[Progress] = []
    here = run_stage.execute(request(tmp_path / "here", text="abc"), seen.append)
    there = start(request(tmp_path / "there", text="abc"), tmp_path / "elsewhere")
    out, err = there.communicate(timeout=60)
    assert there.returncode == 0, err
    progress, made = (json.loads(line) for line in out.splitlines())
    assert made == {
        "event": "artifact",
        "path": str(LocalStore(tmp_path / "there").path("toy", here.manifest.fingerprint)),
        "fingerprint": here.manifest.fingerprint,
        "digest": here.digest,
    }
    assert progress.pop("event") == "progress"
    assert [Progress("toy.a", **progress)] == seen
    assert "what a library prints" in err
    again = start(request(tmp_path / "there", text="abc"), tmp_path / "elsewhere", "-")
    out, _ = again.communicate(request(tmp_path / "there", text="abc").model_dump_json(), timeout=60)
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["artifact"]  # it was there


def test_inputs_are_found_in_the_store_by_fingerprint(tmp_path: Path) -> None:
    first = run_stage.execute(request(tmp_path, text="a"))
    reads = {"model": ArtifactRef(stage="toy", fingerprint=first.manifest.fingerprint)}
    second = run_stage.execute(request(tmp_path, text="b", inputs=reads))
    assert (second.path / "out.txt").read_text() == "ab"
    assert second.manifest.parents == {"model": first.digest}
    missing = {"model": ArtifactRef(stage="toy", fingerprint="0" * 64)}
    with pytest.raises(IngotError, match=r"the input model \(toy 000000000000\) is not in"):
        run_stage.execute(request(tmp_path, text="c", inputs=missing))


def test_a_checkout_that_would_make_something_else_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toy\.a was planned as 000000000000, this checkout would make"):
        run_stage.execute(request(tmp_path, fingerprint="0" * 64))
    assert list(LocalStore(tmp_path).artifacts()) == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [("ConfigError", 2), ("IntegrityError", 3), ("DiskFullError", 4), ("NumericError", 5), ("GateRefused", 7)],
)
def test_errors_end_with_their_exit_code_and_are_told_in_full(tmp_path: Path, kind: str, code: int) -> None:
    process = start(request(tmp_path / "store", fail=kind), tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    told = json.loads(out.splitlines()[-1])
    assert told == {"event": "error", "kind": kind, "message": "it failed", "hint": "do this"}
    assert "Traceback" not in err


def test_sigterm_stops_the_stage_which_keeps_what_it_needs_to_go_on(tmp_path: Path) -> None:
    process = start(request(tmp_path / "store", sleep=True), tmp_path)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "progress"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert [path.read_text() for path in tmp_path.glob("store/scratch/*/progress")] == ["half way"]
    run_stage.execute(request(tmp_path / "store"))
    assert list(tmp_path.glob("store/scratch/*")) == []


@pytest.mark.parametrize("text", ["{", '{"stage": "toy"}', None])
def test_what_is_no_request_is_refused(tmp_path: Path, text: str | None) -> None:
    process = start(request(tmp_path), tmp_path, "other.json")
    if text is not None:
        process.kill()
        process.communicate()
        (tmp_path / "other.json").write_text(text)
        process = start(request(tmp_path), tmp_path, "other.json")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is not a stage request" in err
