"""The catalogue names tests that are there."""

from __future__ import annotations

from tests.faults import catalogue


def test_every_test_of_the_catalogue_is_there() -> None:
    assert catalogue.missing() == []
    assert len(catalogue.FAULTS) == 24
