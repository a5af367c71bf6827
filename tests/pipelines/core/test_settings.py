"""Settings: frozen, closed to unknown keys, and exact about what is identity."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from pipelines.core import fingerprint
from pipelines.core.settings import ELASTIC, NOT_IDENTITY, Settings


class Child(Settings):
    method: Literal["rtn", "gptq"] = Field("rtn", description="Method.")
    threads: int = Field(2, description="Threads.", json_schema_extra=NOT_IDENTITY)


class Section(Settings):
    lr: float = Field(0.1, gt=0, description="Rate.")
    shape: tuple[int, int] = Field((2, 3), description="Shape.")
    children: list[Child] = Field(default_factory=list, description="Children.")
    named: dict[str, Child] = Field(default_factory=dict, description="By name.")
    ranks: int = Field(2, description="Ranks.", json_schema_extra=ELASTIC)
    log_level: str = Field("info", description="Level.", json_schema_extra=NOT_IDENTITY)


def test_identity_leaves_out_what_cannot_change_a_result_at_every_depth() -> None:
    section = Section(children=[Child(threads=8)], named={"a": Child(method="gptq")}, log_level="debug")
    assert section.identity() == {
        "lr": 0.1,
        "shape": [2, 3],
        "children": [{"method": "rtn"}],
        "named": {"a": {"method": "gptq"}},
        "ranks": 2,
    }


def test_an_elastic_field_is_identity_and_not_resume_key() -> None:
    """Another number of ranks gives another artifact, and goes on from the same checkpoints."""
    few, many = Section(ranks=1), Section(ranks=8)
    assert few.identity() != many.identity()
    assert few.resume_key() == many.resume_key()
    assert {"ranks": 1, **few.resume_key()} == few.identity()
    assert Section(lr=0.2).resume_key() != few.resume_key()


def test_a_field_outside_identity_does_not_change_the_fingerprint_and_any_other_does() -> None:
    base = fingerprint.digest(Section(children=[Child()]).identity())
    assert fingerprint.digest(Section(children=[Child(threads=64)], log_level="error").identity()) == base
    for other in (Section(children=[Child()], lr=0.2), Section(children=[Child(method="gptq")]), Section()):
        assert fingerprint.digest(other.identity()) != base


def test_a_default_and_the_same_value_given_are_one_identity() -> None:
    assert Section(lr=0.1, shape=(2, 3)).identity() == Section().identity()


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"learning_rate\n  Extra inputs are not permitted"):
        Section.model_validate({"learning_rate": 0.1})


def test_values_do_not_change_after_validation() -> None:
    section = Section()
    with pytest.raises(ValidationError, match="frozen"):
        section.lr = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(number: float) -> None:
    with pytest.raises(ValidationError, match="lr\n  Input should be a finite number"):
        Section(lr=number)


def test_defaults_are_validated_too() -> None:
    class Wrong(Settings):
        rate: float = Field(-1.0, gt=0, description="Rate.")

    with pytest.raises(ValidationError, match="greater than 0"):
        Wrong()
