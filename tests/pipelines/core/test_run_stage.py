"""materialize: the body runs exactly when it must, on verified inputs, in one process at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import IntegrityError, LockedError
from pipelines.core.fingerprint import digest
from pipelines.core.run_stage import materialize
from pipelines.core.settings import ELASTIC, Settings
from pipelines.core.stage import Stage, StageContext, StageFunction
from pipelines.core.store import LocalStore

CHECKOUT = Path(__file__).resolve().parents[3]


class Config(Settings):
    text: str = Field("hello", description="What the stage writes.")
    ranks: int = Field(1, description="Ranks.", json_schema_extra=ELASTIC)


class Counting(Stage):
    """A stage whose body is a local function that counts its runs."""

    def __init__(self) -> None:
        super().__init__("prepare", version=1, entry="none:none", observations=("times.json",))
        object.__setattr__(self, "contexts", [])
        object.__setattr__(self, "fault", None)

    contexts: list[StageContext]
    fault: Exception | None

    def body(self) -> StageFunction:
        def run(config: Any, inputs: Mapping[str, Artifact], out_dir: Path, context: StageContext) -> dict[str, Any]:
            self.contexts.append(context)
            (context.scratch / "progress").write_text("half way")
            if self.fault is not None:
                raise self.fault
            (out_dir / "out.txt").write_text(config.text)
            (out_dir / "times.json").write_text(str(len(self.contexts)))
            return {"letters": len(config.text)}

        return run


class Bench:
    """A store, a stage, and the shortest way to run it."""

    def __init__(self, root: Path) -> None:
        self.store, self.stage = LocalStore(root), Counting()

    @property
    def runs(self) -> int:
        return len(self.stage.contexts)

    def make(
        self, text: str = "hello", inputs: Mapping[str, Artifact] | None = None, *, ranks: int = 1, **options: Any
    ) -> Artifact:
        context = StageContext(node="prepare", scratch=Path("/nowhere"))
        keys = {name: used.manifest.fingerprint for name, used in (inputs or {}).items()}
        config = Config(text=text, ranks=ranks)
        return materialize(
            self.stage, config, inputs or {}, self.store, context, input_keys=keys, data_hash="d", **options
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def test_the_body_runs_once_for_one_identity(bench: Bench) -> None:
    first, again = bench.make(), bench.make()
    assert bench.runs == 1
    assert again.manifest == first.manifest
    assert (first.path / "out.txt").read_text() == "hello"
    assert first.manifest.summary == {"letters": 5}
    assert first.manifest.provenance is not None
    assert first.manifest.provenance.data_hash == "d"


def test_another_setting_is_another_artifact(bench: Bench) -> None:
    assert bench.make("one").path != bench.make("two").path
    assert bench.runs == 2


def test_force_runs_the_body_again_and_replaces_the_artifact(bench: Bench) -> None:
    first = bench.make()
    forced = bench.make(force=True)
    assert bench.runs == 2
    assert forced.path == first.path
    assert forced.digest == first.digest
    assert (forced.path / "times.json").read_text() == "2"


def test_a_failed_body_publishes_nothing_and_the_next_attempt_finds_its_scratch(bench: Bench) -> None:
    object.__setattr__(bench.stage, "fault", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        bench.make()
    assert list(bench.store.artifacts()) == []
    scratch = bench.stage.contexts[0].scratch
    assert (scratch / "progress").exists()
    object.__setattr__(bench.stage, "fault", None)
    made = bench.make()
    assert bench.stage.contexts[1].scratch == scratch
    assert not scratch.exists()
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "out.txt", "times.json"]
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]


def test_another_number_of_ranks_goes_on_from_the_same_scratch_and_makes_an_artifact_of_its_own(bench: Bench) -> None:
    object.__setattr__(bench.stage, "fault", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        bench.make(ranks=4)
    object.__setattr__(bench.stage, "fault", None)
    made = bench.make(ranks=2)
    assert bench.stage.contexts[0].scratch == bench.stage.contexts[1].scratch
    assert made.manifest.identity["config"]["ranks"] == 2
    assert bench.make(ranks=4).path != made.path


def test_a_damaged_artifact_manifest_is_work_to_do(bench: Bench) -> None:
    made = bench.make()
    (made.path / artifact.MANIFEST).write_text("{")
    assert bench.make().digest == made.digest
    assert bench.runs == 2


def test_a_damaged_input_is_refused_before_the_body_runs(bench: Bench) -> None:
    parent = bench.make("parent")
    (parent.path / "out.txt").write_text("tampered")
    with pytest.raises(IntegrityError, match=r"out\.txt does not match its manifest"):
        bench.make("child", {"model": parent})
    assert bench.runs == 1
    assert not bench.store.find("prepare", digest({}))


def test_parents_are_recorded_by_digest(bench: Bench) -> None:
    parent = bench.make("parent")
    child = bench.make("child", {"model": parent})
    assert child.manifest.parents == {"model": parent.digest}
    assert child.manifest.identity["inputs"] == {"model": parent.manifest.fingerprint}


def test_the_context_carries_the_store_and_the_scratch_of_this_identity(bench: Bench) -> None:
    made = bench.make()
    (context,) = bench.stage.contexts
    assert context.store == bench.store.root
    resume_key = digest(bench.stage.resume_key(Config(), {}))
    assert resume_key != made.manifest.fingerprint
    assert context.scratch == bench.store.scratch("prepare", resume_key)


def test_a_locked_artifact_is_refused_or_served_from_the_cache(bench: Bench) -> None:
    made = bench.make()
    with bench.store.lease("prepare", digest(bench.stage.resume_key(Config(), {})), wait_s=0):
        assert bench.make(wait_s=0).digest == made.digest  # nothing to build: no lease is needed
        with pytest.raises(LockedError, match="stage prepare-"):
            bench.make(force=True, wait_s=0)
    assert bench.runs == 1


CROWD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.core import run_stage
from pipelines.core.settings import ELASTIC, Settings
from pipelines.core.stage import Stage, StageContext
from pipelines.core.store import LocalStore

class Racing(Stage):
    def body(self):
        def run(config, inputs, out_dir, context):
            with open(Path(sys.argv[2]) / "runs", "a") as log:
                log.write("x")
            time.sleep(0.2)
            (out_dir / "out.txt").write_text("result")
            return {}
        return run

class Empty(Settings): pass

for repeat in range(int(sys.argv[3])):
    made = run_stage.materialize(
        Racing("prepare", version=repeat, entry="n:n"), Empty(), {}, LocalStore(Path(sys.argv[2]) / "store"),
        StageContext(node="prepare", scratch=Path("/nowhere")), input_keys={}, data_hash=None)
    print(made.digest)
"""


def test_of_four_processes_exactly_one_runs_each_body_and_all_get_the_same(tmp_path: Path) -> None:
    repeats = 5
    command = [sys.executable, "-c", CROWD, str(CHECKOUT), str(tmp_path), str(repeats)]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _process in range(4)]
    answers = [process.communicate(timeout=120)[0].split() for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 4
    assert (tmp_path / "runs").read_text() == "x" * repeats
    assert answers == [answers[0]] * 4
    assert len(answers[0]) == repeats
    assert list((tmp_path / "store").rglob(".*")) == []
    assert list((tmp_path / "store" / "leases").glob("*.holder")) == []


def test_a_sigkilled_body_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    code = CROWD.replace("time.sleep(0.2)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", code, str(CHECKOUT), str(tmp_path), "1"], timeout=60)
    assert killed.returncode == -9
    store = LocalStore(tmp_path / "store")
    assert list(store.artifacts()) == []
    done = subprocess.run(
        [sys.executable, "-c", CROWD, str(CHECKOUT), str(tmp_path), "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (made,) = store.artifacts()
    made.verify()
    assert (tmp_path / "runs").read_text() == "xx"
