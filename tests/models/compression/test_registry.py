"""The registry finds methods by file name, without loading torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from models.compression import registry

_IMPORTS = """
import json, sys
from models.compression import registry
found = [registry.describe(name) for name in registry.names()]
configs = [registry.get(row["name"]).Config().model_dump() for row in found]
print(json.dumps({"found": found, "torch": "torch._C" in sys.modules, "numpy": "numpy" in sys.modules}))
"""


def test_the_first_methods_are_there_and_helpers_are_not() -> None:
    found = registry.names()
    assert {"rtn", "gptq", "wanda"} <= set(found)
    assert not {"base", "registry", "grid", "obs", "sparse"} & set(found)
    assert found == sorted(found)


def test_names_can_be_asked_by_kind() -> None:
    assert {"rtn", "gptq", "wanda"} <= set(registry.names("weight"))
    assert registry.names("kv_cache") == ["kvquant"]


def test_the_search_is_an_entry_of_its_own_kind() -> None:
    assert registry.get("search").Config().methods == ("rtn", "gptq")
    assert registry.names("search") == ["search"]


def test_a_name_is_its_module() -> None:
    for name in registry.names():
        assert registry.get(name).name == name


@pytest.mark.parametrize(
    ("lookup", "name"),
    [
        (registry.weight, "finetune"),
        (registry.training, "rtn"),
        (registry.structure, "gptq"),
        (registry.kv_cache, "wanda"),
        (registry.packing, "optin"),
    ],
)
def test_a_method_of_another_kind_is_refused_with_those_of_the_kind(lookup: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no compression method \w+.*{name!r}.*\(known: \w+"):
        lookup(name)


def test_layers_of_both_weight_and_training_methods_are_restored_by_name() -> None:
    for name in [*registry.names("weight"), *registry.names("training")]:
        assert registry.packing(name) is registry.get(name)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'gtpq'; did you mean 'gptq'\? \(known: .*rtn.*\)"):
        registry.get("gtpq")


def test_an_unknown_name_far_from_all_offers_none() -> None:
    with pytest.raises(ValueError, match="known") as error:
        registry.get("zzzzzz")
    assert "did you mean" not in str(error.value)


def test_a_helper_is_no_method() -> None:
    with pytest.raises(ValueError, match="'grid'"):
        registry.get("grid")


def test_every_row_of_the_table_is_filled() -> None:
    for name in registry.names():
        row = registry.describe(name)
        assert list(row) == ["name", "kind", "bits", "calibration", "paper"]
        assert all(row.values())


def test_reading_every_configuration_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["torch"] is False
    assert [row["name"] for row in said["found"]] == registry.names()
