"""The command line before anything runs: light imports, exit codes, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import recipe

CHECKOUT = Path(__file__).resolve().parents[2]
HEAVY = ("torch._C", "transformers", "deepspeed", "mlflow", "prefect", "dvc", "accelerate", "datasets")
VERBS = (
    "new",
    "plan",
    "run",
    "compress",
    "resume",
    "status",
    "show",
    "diff",
    "list",
    "promote",
    "rollback",
    "export",
    "try",
    "data",
    "verify",
    "gc",
    "delete",
    "sync",
    "doctor",
)
Ingot = Callable[..., subprocess.CompletedProcess[str]]


def heavy_modules_after(*arguments: str, store: Path) -> list[str]:
    """Which heavy modules a command loads, asked in a fresh process."""
    code = (
        "import sys\nfrom flows.cli import main\nsys.argv[0] = 'ingot'\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=CHECKOUT, capture_output=True, text=True, env={"INGOT_STORE": str(store), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    found: list[str] = json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"'))
    return found


@pytest.mark.parametrize(
    "arguments", [("-h",), ("plan",), ("plan", "--json"), ("list", "recipes"), ("list", "compressors")]
)
def test_looking_loads_neither_torch_nor_orchestration(arguments: tuple[str, ...], empty_store: Path) -> None:
    assert heavy_modules_after(*arguments, store=empty_store) == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(ingot: Ingot, verb: str) -> None:
    assert "Usage" in ingot(verb, "-h").stdout


def test_the_surface_is_the_agreed_one(ingot: Ingot) -> None:
    shown = ingot("-h").stdout
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []


def test_a_plan_touches_nothing(ingot: Ingot, empty_store: Path) -> None:
    assert "Nothing was started." in ingot("plan", "--recipe", "smoke").stdout
    assert not empty_store.exists()


def test_a_plan_as_json_has_a_step_for_every_node(ingot: Ingot) -> None:
    plan = json.loads(ingot("plan", "--recipe", "demo", "--json").stdout)
    steps, code = plan["steps"], plan["exit_code"]
    assert code == 0
    variants = {f"compress.{variant.name}" for variant in recipe.resolve("demo").compress}
    assert {step["node"] for step in steps} >= {"prepare", "pretrain", "promote", *variants}


def test_a_plan_is_drawn_with_the_state_of_each_stage_and_arrows_that_tell_the_order(ingot: Ingot) -> None:
    lines = ingot("plan", "--recipe", "smoke", "--graph", "compress.0.name=int8").stdout.splitlines()
    boxes = {line.split("[")[0].strip(): line.split('"')[1] for line in lines if "[" in line}
    arrows = [
        tuple(boxes[end].partition("<")[0] for end in line.strip().split(" --> ")) for line in lines if "-->" in line
    ]
    assert lines[0] == "flowchart LR"
    assert boxes["n0"] == "prepare<br/>run"
    assert set(arrows) == {
        ("data.dvc", "prepare"),
        ("prepare", "pretrain"),
        ("pretrain", "evaluate.pretrain"),
        ("prepare", "pretrain.adamw"),
        ("pretrain.adamw", "compare.adamw"),
        ("evaluate.pretrain", "compare.adamw"),
        ("pretrain", "compress.int8"),
        ("compress.int8", "evaluate.int8"),
        ("evaluate.pretrain", "evaluate.int8"),
        ("evaluate.int8", "promote"),
    }
    assert "give one of the two" in ingot("plan", "--graph", "--json", check=2).stderr


def test_a_plan_for_another_machine_refuses_nothing_that_this_one_could_not_hold(ingot: Ingot) -> None:
    large = ("pretrain.preset=7b", "pretrain.model.ffn_width=11008", "pretrain.batch_size=64")
    here = ingot("plan", *large, "compute.device=cpu", "compute.memory=8", check=2).stderr
    assert "pretrain cannot fit" in here
    assert "pretrain.preset=" in here
    there = json.loads(ingot("plan", "--world-size", "8", "--json", *large, "compute.price_per_hour=2").stdout)["steps"]
    (pretrain,) = (step["estimate"] for step in there if step["node"] == "pretrain")
    assert pretrain["ranks"] == 8
    assert pretrain["facts"]["parameters"] > 6e9
    assert pretrain["cost"] == pytest.approx(8 * 2 * pretrain["seconds"] / 3600)
    assert pretrain["source"] == "stated"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "pretrain.stepps=3"),
        ("run", "pretrain.batch_size=7"),
        ("run", "pretrain.model.heads=7"),
        ("run", "pretrain.lisa.enabled=true", "pretrain.lisa.layers=99"),
        ("run", "--recipe", "nothing-like-this"),
        ("run", "--only", "nothing-like-this"),
        ("list", "nothing-like-this"),
        ("show", "nothing-like-this"),
        ("resume",),
        ("status",),
        ("diff", "a", "b"),
        ("export", "champion", "somewhere"),
        ("try", "-p", "a"),
        ("no-such-verb",),
    ],
)
def test_bad_input_ends_with_2_and_no_traceback(ingot: Ingot, arguments: tuple[str, ...]) -> None:
    done = ingot(*arguments, check=2)
    assert "Traceback" not in done.stderr
    assert len(done.stderr) > 20


def test_the_resolved_configuration_and_its_schema_can_be_printed(ingot: Ingot) -> None:
    config = json.loads(ingot("show", "config", "pretrain.steps=321", "--recipe", "smoke").stdout)
    assert config["pretrain"]["steps"] == 321
    schema = json.loads(ingot("show", "schema").stdout)
    assert set(schema["properties"]) == {"extends", *config}


@pytest.mark.parametrize("what", ["models", "runs", "artifacts"])
def test_an_empty_store_lists_nothing(ingot: Ingot, what: str) -> None:
    assert json.loads(ingot("list", what, "--json").stdout) == []


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("compressors", {"rtn", "gptq", "wanda"}),
        ("optimizers", {"lamb", "adamw", "lars"}),
        ("probes", {"latency", "samples"}),
        ("stages", {"prepare", "pretrain", "promote"}),
    ],
)
def test_methods_are_listed_by_name(ingot: Ingot, what: str, names: set[str]) -> None:
    assert names <= {row["name"] for row in json.loads(ingot("list", what, "--json").stdout)}


def test_verify_names_an_artifact_whose_manifest_cannot_be_read(ingot: Ingot, empty_store: Path) -> None:
    folder = empty_store / "artifacts" / "prepare" / ("0" * 32)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{ half a manif")
    assert str(folder / "manifest.json") in ingot("verify", check=3).stderr
