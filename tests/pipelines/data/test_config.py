"""Configuration: identity is what changes bytes, and impossible values are refused with the valid range."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from pipelines.core.program import ROOT as CHECKOUT
from pipelines.data.config import DataConfig, PrepareConfig, PrepareJob

NOT_IDENTITY = {"workers", "max_expansion", "max_window_bytes"}
"""What may be read, and how fast, never what it becomes."""


def test_the_location_of_the_corpus_and_the_worker_count_are_not_identity() -> None:
    here = PrepareJob(data=DataConfig(), prepare=PrepareConfig(workers=1))
    there = PrepareJob(data=DataConfig(path="other", dvc_file="other.dvc", rev="v1"), prepare=PrepareConfig(workers=9))
    assert here.identity() == there.identity()


@pytest.mark.parametrize("field", sorted(PrepareConfig.model_fields.keys() - NOT_IDENTITY))
def test_every_other_field_is_identity(field: str) -> None:
    assert field in PrepareConfig().identity()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 259),
        ("sequence_length", 7),
        ("max_bad_fraction", 1.1),
        ("max_bad_fraction", float("nan")),
        ("permutations", 30),
        ("near_duplicate_similarity", 0.1),
        ("test_fraction", 0.0),
        ("workers", 0),
        ("seed", -1),
    ],
)
def test_impossible_values_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        PrepareConfig(**{field: value})


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"keep their sum below 0\.9"):
        PrepareConfig(validation_fraction=0.45, test_fraction=0.45)


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_characters 11 is above max_characters 10"):
        PrepareConfig(min_characters=11, max_characters=10)


@pytest.mark.parametrize("path", ["", "/etc", "../data", "a/../../b", "~/data"])
def test_a_corpus_outside_the_project_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="must be a path inside the project"):
        DataConfig(path=path)


@pytest.mark.parametrize("rev", ["", " ", "--output=x", "HEAD:data.dvc"])
def test_what_git_would_not_read_as_a_revision_is_refused(rev: str) -> None:
    with pytest.raises(ValidationError, match="not a git revision"):
        DataConfig(rev=rev)


def test_a_plan_needs_neither_torch_nor_dvc() -> None:
    script = (
        "import sys; from pathlib import Path; from pipelines.data import config, versioning;"
        " versioning.data_hash(config.DataConfig(), Path.cwd());"
        "print(sorted({'torch', 'dvc', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
