"""Recipes: inheritance, overrides, and errors that name path, value and the nearest valid name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with Prefect
import pytest

from flows import graph, recipe, recipe_schema
from flows.config import RunConfig
from models.architectures.config import DEMO_VOCABULARY
from pipelines.core.errors import ConfigError
from pipelines.core.program import ROOT as CHECKOUT


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_that_ships_is_valid_and_described(name: str) -> None:
    assert isinstance(recipe.resolve(name), RunConfig)
    assert len(recipe.description(name)) > 10


def test_the_agreed_recipes_exist() -> None:
    assert {"smoke", "bench", "demo", "demo-long", "demo-encoder", "demo-qat", "bert-lamb", "decoder-lamb"} <= set(
        recipe.names()
    )


def test_an_extended_recipe_keeps_what_it_does_not_replace() -> None:
    base, longer = recipe.resolve("demo"), recipe.resolve("demo-long")
    assert longer.pretrain.steps > base.pretrain.steps
    assert longer.prepare == base.prepare
    assert longer.compress == base.compress


def test_an_override_wins_over_the_file() -> None:
    assert recipe.resolve("smoke", ["pretrain.optimizer.lr=0.5", "pretrain.steps=99"]).pretrain.optimizer.lr == 0.5


def test_an_override_that_is_not_toml_is_a_string() -> None:
    assert recipe.resolve("smoke", ["promote.model_name=my-model"]).promote.model_name == "my-model"


def test_a_number_picks_one_child_and_any_other_key_sets_all() -> None:
    table: dict[str, Any] = {"compress": [{"method": "rtn", "bits": 8}, {"method": "rtn", "bits": 4}]}
    recipe.apply(table, "compress.1.bits=3")
    assert [child["bits"] for child in table["compress"]] == [8, 3]
    recipe.apply(table, "compress.method=gptq")
    assert [child["method"] for child in table["compress"]] == ["gptq", "gptq"]


def test_children_that_became_equal_are_one_child() -> None:
    overrides = ["compress.method=gptq", "compress.bits=4", "compress.group_size=64"]
    assert len(recipe.resolve("demo", overrides).compress) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.stepps=3", ["pretrain.stepps", "'steps'"]),
        ("pretrain.optimizer.lrr=3", ["pretrain.optimizer.lrr", "'lr'"]),
        ("pretrian.steps=3", ["pretrian", "'pretrain'"]),
        ("pretrain.steps=many", ["pretrain.steps", "'many'"]),
        ("pretrain.steps=0", ["pretrain.steps", "0"]),
        ("pretrain.batch_size=7", ["pretrain", "7", "valid"]),
        ("pretrain.model.heads=7", ["pretrain", "heads = 7", "valid"]),
        ("compress.0.method=gtpq", ["gtpq", "gptq"]),
        ("compress.0.bitts=4", ["compress.0", "bitts", "bits"]),
        ("evaluate.probes.latency.repeat=3", ["evaluate.probes.latency.repeat = 3", "'repeats'"]),
        ("pretrain.monitors.loss_spikes.facto=3", ["pretrain.monitors.loss_spikes.facto = 3", "'factor'"]),
        ("pretrain.monitors.loss_spikes.window=3", ["pretrain.monitors.loss_spikes.factor: Field required"]),
        ("pretrain.objective_settings.mask=1", ["pretrain.objective_settings.mask = 1", "(valid: none)"]),
        ("promote.candidate=nobody", ["promote.candidate", "nobody"]),
    ],
)
def test_a_wrong_setting_is_refused_by_path_value_and_nearest_name(override: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        recipe.resolve("demo", [override])
    for part in said:
        assert part in str(error.value)


def test_lisa_deeper_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="lisa"):
        recipe.resolve("demo", ["pretrain.lisa.enabled=true", "pretrain.lisa.layers=99"])


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'demo'"):
        recipe.resolve("dmo")


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        recipe.resolve("demo", ["pretrain.steps"])


def test_an_index_beyond_the_children_is_refused() -> None:
    with pytest.raises(ConfigError, match="no element 9"):
        recipe.resolve("demo", ["compress.9.bits=4"])


def test_broken_toml_is_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[pretrain\nsteps = 3")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        recipe.resolve(str(path))


def test_a_recipe_of_ones_own_extends_one_that_ships(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "smoke"\n[pretrain]\nsteps = 41\n')
    assert recipe.resolve(str(path)).pretrain.steps == 41


def test_the_chain_of_the_qat_recipe_is_planned_with_the_pretrained_model_as_teacher() -> None:
    """Prune, distil, quantize: each child starts from the one before it, and only distillation has a teacher."""
    from flows.graph import identify

    planned = identify(recipe.resolve("demo-qat"), "0" * 32)
    inputs = {name: dict(planned[f"compress.{name}"].node.inputs) for name in ("pruned", "distilled", "distilled-3bit")}
    assert inputs["pruned"] == {"prepare": "prepare", "model": "pretrain"}
    assert inputs["distilled"] == {"prepare": "prepare", "model": "compress.pruned", "teacher": "pretrain"}
    assert inputs["distilled-3bit"] == {"prepare": "prepare", "model": "compress.distilled"}


def test_ranks_of_a_trained_child_are_identity_but_do_not_part_it_from_its_unfinished_work() -> None:
    from flows.graph import identify

    one, other = (
        identify(recipe.resolve("demo-qat", [f"compress.1.{key}={value}"]), "0" * 32)["compress.distilled"]
        for key, value in (("world_size", 2), ("world_size", 1))
    )
    assert one.fingerprint != other.fingerprint
    assert one.resume_key == other.resume_key
    quieter = identify(recipe.resolve("demo-qat", ["compress.1.checkpoint_every=7"]), "0" * 32)["compress.distilled"]
    assert quieter.fingerprint == one.fingerprint


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["pretrain.lisa.enabled=false", "pretrain.lisa.layers=2"],
            "pretrain.lisa.layers does nothing while pretrain.lisa.enabled is off",
        ),
        (["compute.retries=0", "compute.retry_delay_s=3"], "compute.retry_delay_s does nothing while compute.retries"),
        (
            ["evaluate.probes.latency.enabled=false", "evaluate.probes.latency.repeats=3"],
            "evaluate.probes.latency.repeats does nothing while evaluate.probes.latency.enabled is off",
        ),
    ],
)
def test_a_key_under_a_closed_switch_is_refused_and_the_switch_is_named(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe.resolve("smoke", overrides)


def test_a_probe_is_not_told_what_does_nothing_for_the_family() -> None:
    said = "evaluate.probes.samples: temperature does nothing: an encoder fills in words"
    with pytest.raises(ConfigError, match=said):
        recipe.resolve("demo-encoder", ["evaluate.probes.samples.temperature=0.5"])
    with pytest.raises(ConfigError, match="'To be' has none"):
        recipe.resolve("demo-encoder", ['evaluate.probes.samples.prompts=["To be"]'])
    off = ["evaluate.probes.samples.temperature=0.5", "evaluate.probes.samples.enabled=false"]
    assert not recipe.resolve("demo-encoder", off).evaluate.probes["samples"].enabled


def test_switching_a_section_off_takes_back_what_was_said_of_it_before(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "smoke"\n[pretrain.lisa]\nenabled = true\nlayers = 1\n')
    assert recipe.resolve(str(path)).pretrain.lisa.layers == 1
    assert not recipe.resolve(str(path), ["pretrain.lisa.enabled=false"]).pretrain.lisa.enabled
    above = tmp_path / "above.toml"
    above.write_text('extends = "mine.toml"\n[pretrain.lisa]\nenabled = false\n')
    assert not recipe.resolve(str(above)).pretrain.lisa.enabled


@pytest.mark.parametrize("name", recipe.names())
def test_a_resolved_recipe_written_as_toml_is_the_same_run(name: str, tmp_path: Path) -> None:
    config = recipe.resolve(name, ["pretrain.seed=7"])
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml(config))
    again = recipe.resolve(str(path))
    assert again == config
    assert graph.identify(again, "d") == graph.identify(config, "d")


def test_none_is_left_out_of_toml_where_it_is_the_default_and_a_secret_always(tmp_path: Path) -> None:
    table = {"data": {"rev": None}, "pretrain": {"seed": 3}, "tracking": {"uri": "http://u:c4n4ry@host:5000"}}
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml(recipe.validated(table)))
    assert "c4n4ry" not in path.read_text()
    assert "# tracking.uri held a secret and is left out" in path.read_text()
    assert recipe.resolve(str(path)) == recipe.validated({"pretrain": {"seed": 3}})


def test_presets_are_named_by_the_vocabulary_that_the_demo_has() -> None:
    assert recipe.resolve("demo").prepare.vocab_size == DEMO_VOCABULARY


@pytest.mark.parametrize(("old", "new"), [("124m", "90m"), ("350m", "300m")])
def test_a_preset_that_was_renamed_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"pretrain.preset = '{old}' is called '{new}' now"):
        recipe.resolve("smoke", [f"pretrain.preset={old}"])
    assert recipe.resolve("smoke", [f"pretrain.preset={new}"]).pretrain.preset == new


OWN_TASK = """
tracking.uri = "sqlite:///registry/models.db"
[[evaluate.tasks.lm_eval]]
file = "tasks/own.yaml"
data = "tasks/data"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a task of its own, below which somebody works in a folder that has one of the same name."""
    for root in (tmp_path, tmp_path / "elsewhere"):
        (root / "tasks" / "data").mkdir(parents=True)
        (root / "tasks" / "own.yaml").write_text(f"task: {root.name}\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.toml").write_text(f'extends = "smoke"\n{OWN_TASK}')
    return tmp_path


def test_paths_in_a_recipe_start_at_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "elsewhere")
    config = recipe.resolve("own", project=project)
    (task,) = config.evaluate.tasks.lm_eval
    assert (task.file, task.data) == (str(project / "tasks" / "own.yaml"), str(project / "tasks" / "data"))
    assert config.tracking.uri == f"sqlite:///{project}/registry/models.db"
    again = recipe.validated(config.model_dump(mode="json", by_alias=True, exclude_unset=True))
    assert again == config, "what a record holds means the same anywhere"


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluate.tasks.lm_eval.0.file=tasks/own.yaml", "evaluate.tasks.lm_eval.data=tasks/data"],
        ['evaluate.tasks.lm_eval=[{file="tasks/own.yaml", data="tasks/data"}]'],
        ['evaluate.tasks={lm_eval=[{file="tasks/own.yaml", data="tasks/data"}], names=[]}'],
    ],
)
def test_paths_that_are_typed_start_at_the_working_directory(
    overrides: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = project / "elsewhere"
    monkeypatch.chdir(here)
    typed = [*overrides, "tracking.uri=sqlite:///x.db", "evaluate.tasks.items=8", "base.from=../weights"]
    name, started = recipe.from_here("own", typed, project)
    assert started[-2:] == ["evaluate.tasks.items=8", f"base.from={project}/weights"]
    monkeypatch.chdir("/")
    config = recipe.resolve(name, started, project)
    (task,) = config.evaluate.tasks.lm_eval
    assert (task.file, task.data) == (str(here / "tasks" / "own.yaml"), str(here / "tasks" / "data"))
    assert config.tracking.uri == f"sqlite:///{here}/x.db"


@pytest.mark.parametrize("uri", ["sqlite:////srv/x.db", "https://host/path", "postgresql://u@h/db"])
def test_what_is_no_relative_path_is_kept(uri: str, project: Path) -> None:
    _, started = recipe.from_here("own", [f"tracking.uri={uri}", "base.from=models:/m@champion"], project)
    config = recipe.resolve("own", started, project)
    assert (config.tracking.uri, config.base.from_) == (uri, "models:/m@champion")


def test_every_recipe_fits_the_schema_that_editors_are_given_and_a_slip_does_not() -> None:
    known = recipe_schema.schema()
    jsonschema.Draft202012Validator.check_schema(known)
    editor = jsonschema.Draft202012Validator(known)
    for name in recipe.names():
        table = tomllib.loads((CHECKOUT / "flows" / "recipes" / f"{name}.toml").read_text())
        assert [error.message for error in editor.iter_errors(table)] == []
    slips: list[dict[str, Any]] = [
        {"compress": [{"method": "gptq", "bitz": 4}]},
        {"compress": [{"method": "gtpq"}]},
        {"compress": [{"heads": 2}]},  # rtn, the method where none is named, has no heads
        {"compress": [{"method": "gptq", "bits": 99}]},
        {"pretrain": {"stepps": 3}},
        {"extend": "demo"},
    ]
    assert [slip for slip in slips if editor.is_valid(slip)] == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("foo.bar=1", "foo is not a key; there are data, base, prepare, pretrain, baselines, compress, "),
        ("base.fron=champion", "base.fron is not a key; did you mean 'from'?"),
        ("pretrain.optimizer.zzz=1", "pretrain.optimizer.zzz is not a key; there are name, lr, "),
    ],
)
def test_a_key_that_resembles_none_is_answered_with_those_that_there_are(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe.resolve("smoke", [override])
    assert said in str(refused.value)


@pytest.mark.parametrize("written", ["none", "None", "null", '"none"'])
def test_none_unsets_what_has_a_value_on_the_command_line(written: str) -> None:
    assert recipe.resolve("smoke").pretrain.optimizer.clip == 1.0
    config = recipe.resolve("smoke", [f"pretrain.optimizer.clip={written}", f"evaluate.max_documents={written}"])
    assert (config.pretrain.optimizer.clip, config.evaluate.max_documents) == (None, None)
    assert recipe.validated(tomllib.loads(recipe.to_toml(config))) == config


def test_none_unsets_what_a_recipe_below_has_set(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "smoke"\n[evaluate]\nmax_documents = "none"\n[pretrain.optimizer]\nclip = "none"\n')
    config = recipe.resolve(str(mine))
    assert (config.pretrain.optimizer.clip, config.evaluate.max_documents) == (None, None)


def test_none_is_a_word_where_it_is_a_value_of_its_own() -> None:
    config = recipe.resolve("smoke", ['compress=[{method="rtn", activations="none"}]', "promote.model_name=none"])
    assert config.compress[0].parameters.activations == "none"
    assert config.promote.model_name == "none"


@pytest.mark.parametrize("written", ["2024", "2024-01-01", "1e3", "true", "0x10", "12:30:00"])
def test_text_stays_what_was_typed(written: str) -> None:
    assert recipe.resolve("smoke", [f"tracking.experiment={written}"]).tracking.experiment == written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[compress]\nmethod = 'rtn'\n", "write [[compress]], in double brackets"),
        ("[pretrain.optimizer]\nbetas = '0.9,0.99'\n", "write it in brackets: [0.9,0.99]"),
        ("[tracking]\nexperiment = 2024\n", 'write it in quotes: "2024"'),
        ("[tracking]\nexperiment = true\n", 'write it in quotes: "true"'),
        ("extends = 5\n", "extends = 5 names no recipe"),
        ("extends = ['smoke']\n", "names no recipe"),
        ("extends = ''\n", "names no recipe"),
        (f"a = {'[' * 3000}{']' * 3000}\n", "nested too deep"),
        ("\x00", "is not valid TOML"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_told_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe.resolve(str(path))
    assert said in str(caught.value)


def test_a_byte_order_mark_before_a_recipe_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbfextends = "smoke"\n')
    assert recipe.resolve(str(path)) == recipe.resolve("smoke")


def test_a_recipe_that_extends_its_own_name_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").write_text('extends = "mine"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml extends itself"):
        recipe.resolve("mine", project=tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".toml", "../../etc/passwd", "a\nb", "a\0b"])
def test_a_name_that_no_file_can_have_is_no_recipe(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe") as caught:
        recipe.resolve(name, project=tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("written", ["data/", "./data", "data//", "./data/."])
def test_a_folder_is_the_same_however_it_is_written(written: str) -> None:
    assert recipe.resolve("smoke", [f"data.path={written}"]).data.path == "data"
