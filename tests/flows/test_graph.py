"""The graph: which nodes there are, what they read, and how identity flows down."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flows import recipe
from flows.graph import identify, nodes
from pipelines.core.errors import ConfigError
from pipelines.registry.initial_weights import Source
from pipelines.training.config import PretrainConfig

DATA = "ab" * 16


def recipe_with(tmp_path: Path, children: str) -> str:
    """A recipe of one's own with these children."""
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "smoke"\ncompress = [{children}]\n')
    return str(path)


def test_every_node_comes_after_what_it_reads() -> None:
    seen: set[str] = set()
    for node in nodes(recipe.resolve("demo")):
        assert set(node.inputs.values()) <= seen
        seen.add(node.name)


def test_every_model_is_evaluated_and_reaches_the_gate() -> None:
    config = recipe.resolve("demo")
    promote = nodes(config)[-1]
    models = ["pretrain", *(child.name for child in config.compress)]
    assert promote.name == "promote"
    assert {f"evaluation:{name}" for name in models} | {f"model:{name}" for name in models} <= set(promote.inputs)


def test_a_baseline_is_the_same_training_with_another_optimizer_and_never_a_candidate(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "smoke"\nbaselines = [{optimizer.name = "adamw", optimizer.lr = 0.002}]\n')
    config = recipe.resolve(str(path))
    graph = {node.name: node for node in nodes(config)}
    own, other = graph["pretrain"].config.identity(), graph["pretrain.adamw"].config.identity()
    assert {key for key in own if own[key] != other[key]} == {"optimizer"}
    assert other["optimizer"]["lr"] == 0.002
    assert graph["pretrain.adamw"].inputs == graph["pretrain"].inputs
    assert graph["compare.adamw"].inputs == graph["evaluate.rtn-int8-channel"].inputs | {"model": "pretrain.adamw"}
    assert not any("adamw" in source for source in graph["promote"].inputs.values())


def test_what_a_baseline_is_measured_by_survives_the_way_to_another_process() -> None:
    """A stage request carries its settings as JSON: read back they have the same identity, and no probe runs."""
    measured = recipe.resolve("demo").evaluate.text_alone()
    again = type(measured).model_validate_json(measured.model_dump_json())
    assert again.identity() == measured.identity()
    assert not any(settings.enabled for settings in again.probes.values())


@pytest.mark.parametrize(
    ("baselines", "refusal"),
    [
        ('{optimizer.name = "adamw"}, {optimizer.name = "adamw", optimizer.lr = 0.1}', "two baselines are called"),
        ('{optimizer.name = "lamb", optimizer.lr = 0.16}', "has the optimizer of the model itself"),
        ('{name = "a b", optimizer.name = "adamw"}', "baselines.0.name"),
        ('{name = "tuned"}', "baselines.0.optimizer"),
    ],
)
def test_baselines_that_compare_nothing_are_refused(tmp_path: Path, baselines: str, refusal: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "smoke"\nbaselines = [{baselines}]\n')
    with pytest.raises(ConfigError, match=refusal):
        recipe.resolve(str(path))


def test_a_child_is_measured_beside_its_parent() -> None:
    graph = {node.name: node for node in nodes(recipe.resolve("smoke"))}
    child = graph["evaluate.rtn-int8-channel"]
    assert child.inputs["base_model"] == "pretrain"
    assert child.inputs["base_evaluation"] == "evaluate.pretrain"


def test_a_chained_child_reads_the_child_it_names(tmp_path: Path) -> None:
    children = '{method = "wanda", name = "sparse"}, {method = "rtn", bits = 8, from = "sparse", name = "both"}'
    graph = {node.name: node for node in nodes(recipe.resolve(recipe_with(tmp_path, children)))}
    assert graph["compress.both"].inputs["model"] == "compress.sparse"
    assert graph["compress.sparse"].inputs["model"] == "pretrain"


def test_a_chain_to_a_child_below_is_refused(tmp_path: Path) -> None:
    children = '{method = "rtn", bits = 8, from = "sparse", name = "both"}, {method = "wanda", name = "sparse"}'
    with pytest.raises(ConfigError, match="is no variant above it"):
        recipe.resolve(recipe_with(tmp_path, children))


def test_two_children_of_one_name_are_refused(tmp_path: Path) -> None:
    children = '{method = "rtn", bits = 8, name = "x"}, {method = "rtn", bits = 4, name = "x"}'
    with pytest.raises(ConfigError, match="two models are called 'x'"):
        recipe.resolve(recipe_with(tmp_path, children))


def test_identity_is_the_same_in_every_process_and_changes_with_the_corpus() -> None:
    config = recipe.resolve("demo")
    first, again, other = identify(config, DATA), identify(config, DATA), identify(config, "cd" * 16)
    assert [n.fingerprint for n in first.values()] == [n.fingerprint for n in again.values()]
    assert not {n.fingerprint for n in first.values()} & {n.fingerprint for n in other.values()}


def test_the_name_of_the_data_folder_is_no_part_of_identity() -> None:
    one = identify(recipe.resolve("demo"), DATA)["prepare"].fingerprint
    assert one == identify(recipe.resolve("demo", ["data.path=elsewhere"]), DATA)["prepare"].fingerprint


def source(weights: str = "0", place: str = "models:/x/3") -> Source:
    return Source(place, weights * 64, "f" * 64, "models:/x@champion is version 3")


def test_training_from_weights_reads_them_through_a_node_of_their_own() -> None:
    config = recipe.resolve("smoke")
    graph = identify(config, DATA, source())
    assert list(graph)[:3] == ["fetch", "prepare", "pretrain"]
    assert graph["pretrain"].node.inputs == {"prepare": "prepare", "init_weights": "fetch"}
    assert "data" not in graph["fetch"].input_keys
    assert graph["fetch"].node.note == "models:/x@champion is version 3"


def test_the_bytes_of_the_weights_are_identity_and_their_name_is_not() -> None:
    config = recipe.resolve("smoke", ["base.from=models:/x@champion"])
    first, renamed, other = (
        identify(config, DATA, each)["pretrain"].fingerprint
        for each in (source(), source(place="/a/folder"), source("1"))
    )
    assert first == renamed != other
    assert first != identify(config, DATA)["pretrain"].fingerprint
    assert first == identify(recipe.resolve("smoke"), DATA, source())["pretrain"].fingerprint


@pytest.mark.parametrize("wanted", ["models:/x", "models:x@champion", "models:/x@champion/3", "models:/x/latest"])
def test_a_malformed_model_name_is_refused_with_the_form(wanted: str) -> None:
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS or models:/NAME/VERSION"):
        recipe.resolve("smoke", [f"base.from={wanted}"])


def test_the_tokenizer_of_the_model_is_an_input_of_prepare_where_it_is_asked_for() -> None:
    tuning = ["base.from=models:/x@champion", "prepare.tokenizer=init_weights"]
    graph = identify(recipe.resolve("smoke", tuning), DATA, source())
    assert graph["prepare"].node.inputs == {"init_weights": "fetch"}
    assert graph["prepare"].input_keys == {"init_weights": graph["fetch"].fingerprint, "data": DATA}
    other = identify(recipe.resolve("smoke", tuning), DATA, source("1"))
    assert graph["prepare"].fingerprint != other["prepare"].fingerprint
    own = identify(recipe.resolve("smoke", tuning[:1]), DATA, source())
    assert own["prepare"].fingerprint == identify(recipe.resolve("smoke"), DATA)["prepare"].fingerprint


def test_a_tokenizer_of_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="which is not set"):
        recipe.resolve("smoke", ["prepare.tokenizer=init_weights"])


# ---- a model from elsewhere --------------------------------------------------------------------------------------


OWN = """
[base]
from = "models:/x@champion"

[[compress]]
method = "rtn"
bits = 8
name = "x"

[[compress]]
method = "gptq"
bits = 4
name = "y"
from = "x"
"""


def test_without_a_section_pretrain_a_model_is_measured_and_compressed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    config = recipe.resolve(str(tmp_path / "own.toml"))
    graph = identify(config, DATA, source())
    assert list(graph) == [
        *("base", "prepare", "evaluate.base", "compress.x", "evaluate.x", "compress.y", "evaluate.y", "promote")
    ]
    assert graph["base"].node.stage.name == "fetch"
    assert graph["prepare"].node.inputs == {"init_weights": "base"}
    assert graph["compress.x"].node.inputs == {"prepare": "prepare", "model": "base"}
    assert graph["evaluate.y"].node.inputs["base_model"] == "base"
    assert graph["promote"].node.inputs["model:base"] == "base"
    again = recipe.validated(config.model_dump(mode="json", by_alias=True))  # as a run's record keeps it
    assert list(identify(again, DATA, source())) == list(graph)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepare.tokenizer=train", "knows its own tokens only"),
        ("promote.candidate=pretrain", "this recipe has base, smallest, x, y"),
    ],
)
def test_what_a_model_without_training_cannot_have_is_refused(override: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    with pytest.raises(ConfigError, match=message):
        recipe.resolve(str(tmp_path / "own.toml"), [override])


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "hidden_act": "silu",
}  # fmt: skip


def test_training_goes_on_with_the_shape_that_config_json_describes(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN + "[pretrain]\nsteps = 80\n")
    config = recipe.resolve(str(tmp_path / "own.toml"))
    start = dataclasses.replace(source(), config=LLAMA)
    trained = identify(config, DATA, start)["pretrain"].node.config
    assert isinstance(trained, PretrainConfig)
    assert (trained.shape.width, trained.shape.key_heads, trained.shape.rope_theta, trained.steps) == (
        32,
        2,
        5000.0,
        80,
    )
    for change, message in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ):
        with pytest.raises(ConfigError, match=message):
            identify(config, DATA, dataclasses.replace(start, config=LLAMA | change))
    with pytest.raises(ConfigError, match="another shape: width is 32, this run's is 64"):
        identify(recipe.resolve("smoke"), DATA, start)
