"""The configuration refuses what cannot be evaluated, and knows what is identity."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.evaluation.config import EvaluateConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_documents": 1}, "greater than or equal to 2"),
        ({"context": 64, "stride": 65}, "stride 65 is longer than context 64"),
        ({"context": 512, "batch_tokens": 256}, "does not hold one window of context 512"),
        ({"confidence": 1.0}, "less than or equal to 0.999"),
        ({"mask_rate": 0.0}, "greater than 0"),
        ({"baselines": ["bzip2"]}, "Input should be 'gzip'"),
        ({"tasks": {"names": ["clozed"]}}, "Input should be 'next_line'"),
        ({"tasks": {"items": 1}}, "greater than or equal to 2"),
        ({"stirde": 3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_values_are_refused_with_the_valid_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate(values)


def test_the_latency_probe_is_not_identity_and_everything_else_is() -> None:
    base = EvaluateConfig().identity()
    assert EvaluateConfig.model_validate({"latency": {"enabled": False, "repeats": 1}}).identity() == base
    for change in ({"batch_tokens": 512}, {"tasks": {"items": 8}}, {"max_documents": 5}, {"bootstrap_seed": 1}):
        assert EvaluateConfig.model_validate(change).identity() != base


def test_every_field_has_a_description() -> None:
    for model in (EvaluateConfig, *(type(getattr(EvaluateConfig(), name)) for name in ("tasks", "latency"))):
        assert all(field.description for field in model.model_fields.values())


def test_planning_and_tables_import_no_torch() -> None:
    code = (
        "import sys; import pipelines.evaluation.config, pipelines.measure.intervals;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
