"""The table of a search: what it accepts, and what it refuses before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from models.compression import registry, search
from pipelines.compression.config import CompressConfig


def test_a_search_is_found_by_name_and_is_no_weight_method() -> None:
    assert registry.get("search").Config is search.Config
    assert registry.names("search") == ["search"]
    assert "search" not in registry.names("weight")


def test_a_recipe_writes_it_like_any_method() -> None:
    child = CompressConfig.model_validate({"method": "search", "max_bits_per_byte_ratio": 1.02, "bits": [3, 8]})
    assert child.name == "search-1.02"
    assert child.identity()["bits"] == [3, 8]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"methods": ["gtpq"]}, "did you mean 'gptq'"),
        ({"methods": ["wanda"]}, "'wanda' has no `bits`"),
        ({"methods": ["search"]}, "no compression method of kind 'weight' 'search'"),
        ({"methods": []}, "at least 1 item"),
        ({"bits": [4, 9]}, "less than or equal to 8"),
        ({"group_sizes": [-1]}, "greater than or equal to 0"),
        ({"max_bits_per_byte_ratio": 1.0}, "greater than 1"),
        ({"max_kl_nats": 0.0}, "greater than 0"),
        ({"sequences": 7}, "greater than or equal to 8"),
    ],
)
def test_what_cannot_be_tried_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        search.Config.model_validate(table)
