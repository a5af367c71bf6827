"""The registry finds methods by file name, without loading torch."""

from __future__ import annotations

import json
import subprocess
import sys

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
    assert registry.names("nothing") == []


def test_what_makes_children_with_methods_is_found_but_is_none() -> None:
    assert registry.get("search").Config().methods == ("rtn", "gptq")
    assert "search" not in registry.names()


def test_a_name_is_its_module() -> None:
    assert registry.get("gptq").__name__ == "models.compression.gptq"


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
