"""One child in a recipe: flat parameters, resolved identity, and errors that name the key."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from models.compression import registry
from pipelines.compression.config import CompressConfig
from pipelines.core import fingerprint


class Recipe(BaseModel):
    """A list of children, as recipes have it."""

    compress: list[CompressConfig]


def child(**table: Any) -> CompressConfig:
    return CompressConfig.model_validate(table)


def refused(**table: Any) -> dict[str, Any]:
    """Return the one error of a child in a recipe."""
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"compress": [{"method": "rtn"}, table]})
    (found,) = error.value.errors()
    return dict(found)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({}, "rtn-int8-channel"),
        ({"method": "rtn", "bits": 4, "group_size": 64}, "rtn-int4-g64"),
        ({"method": "gptq"}, "gptq-int4-g32"),
        ({"method": "wanda", "pattern": "2:4"}, "wanda-2of4-int8"),
        ({"method": "rtn", "name": "mine"}, "mine"),
    ],
)
def test_a_child_names_itself_after_its_method_unless_told(table: dict[str, Any], name: str) -> None:
    assert child(**table).name == name


def test_identity_is_flat_and_holds_every_default() -> None:
    identity = child(method="gptq", bits=3).identity()
    assert identity["bits"] == 3
    assert identity["damp"] == registry.get("gptq").Config().damp
    assert {"method", "samples", "seed", "skip", "embeddings", "group_size", "clip", "order"} <= set(identity)
    assert "parameters" not in identity


def test_a_written_default_is_the_same_identity() -> None:
    assert child(method="rtn").identity() == child(method="rtn", bits=8, clip="mse", name="other").identity()


def test_each_parameter_changes_the_fingerprint_and_is_named() -> None:
    before = child(method="gptq").identity()
    after = child(method="gptq", group_size=64).identity()
    assert fingerprint.digest(before) != fingerprint.digest(after)
    assert [str(change) for change in fingerprint.explain(before, after)] == ["group_size: 32 -> 64"]


@pytest.mark.parametrize("method", registry.names("weight"))
def test_every_method_has_a_stable_identity_and_a_name(method: str) -> None:
    config = child(method=method)
    assert fingerprint.digest(config.identity()) == fingerprint.digest(child(method=method).identity())
    assert config.name.startswith(f"{method}-")


@pytest.mark.parametrize("method", registry.names())
def test_no_method_has_a_parameter_that_a_key_of_the_engine_hides(method: str) -> None:
    assert not set(registry.get(method).Config.model_fields) & (set(CompressConfig.model_fields) | {"from"})


def test_an_unknown_key_is_refused_by_path_and_nearest_name() -> None:
    error = refused(method="rtn", grup_size=4)
    assert error["loc"] == ("compress", 1, "grup_size")
    assert "did you mean 'group_size'?" in error["msg"]
    assert error["input"] == 4


def test_a_key_of_another_method_is_refused() -> None:
    assert "not a key of method 'rtn'" in refused(method="rtn", pattern="2:4")["msg"]


def test_a_misspelt_key_of_the_engine_offers_it() -> None:
    assert "did you mean 'samples'?" in refused(method="gptq", sample=4)["msg"]


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    error = refused(method="wandaa")
    assert error["loc"] == ("compress", 1, "method")
    assert "did you mean 'wanda'?" in error["msg"]


@pytest.mark.parametrize(
    ("table", "where", "said"),
    [
        ({"method": "rtn", "bits": 99}, "bits", "less than or equal to 8"),
        ({"method": "gptq", "damp": 0.0}, "damp", "greater than 0"),
        ({"method": "gptq", "samples": 0}, "samples", "greater than or equal to 1"),
        ({"method": "gptq", "embeddings": "drop"}, "embeddings", "quantize"),
    ],
)
def test_a_value_out_of_range_is_refused_at_its_key(table: dict[str, Any], where: str, said: str) -> None:
    error = refused(**table)
    assert error["loc"][-1] == where
    assert said in error["msg"]


def test_a_name_that_is_no_folder_name_is_refused() -> None:
    assert "a/b" in refused(method="rtn", name="a/b")["msg"]


def test_embeddings_go_on_a_grid_only_where_there_is_one() -> None:
    assert "integer grid" in refused(method="wanda", embeddings="quantize")["msg"]
    assert child(method="gptq", embeddings="quantize").embeddings == "quantize"


def test_a_chained_child_keeps_its_source_out_of_its_own_identity() -> None:
    chained = CompressConfig.model_validate({"method": "gptq", "from": "pruned"})
    assert chained.from_ == "pruned"
    assert chained.identity() == child(method="gptq").identity()


@pytest.mark.parametrize("table", [{"method": "gptq", "bits": 3}, {"method": "wanda", "from": "x"}, {}])
def test_a_dumped_child_reads_back_equal(table: dict[str, Any]) -> None:
    config = CompressConfig.model_validate(table)
    assert CompressConfig.model_validate(config.model_dump(mode="json")) == config
    assert CompressConfig.model_validate(config) is config


def test_a_child_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        child().samples = 3


def test_reading_a_child_loads_no_torch() -> None:
    code = (
        "import sys; from pipelines.compression.config import CompressConfig as C;"
        "C.model_validate({'method': 'gptq', 'bits': 3}).identity(); print('torch._C' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
