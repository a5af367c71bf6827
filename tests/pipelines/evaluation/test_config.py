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


@pytest.mark.parametrize(
    ("tables", "place", "message"),
    [
        ({"latencey": {}}, ("probes", "latencey"), "there is no probe 'latencey'; did you mean 'latency'"),
        ({"latency": {"repeats": 0}}, ("probes", "latency", "repeats"), "greater than or equal to 1"),
        (
            {"latency": {"repeat": 2}},
            ("probes", "latency", "repeat"),
            r"not a key; did you mean 'repeats'\?",
        ),
        ({"relative": {"repeats": 2}}, ("probes", "relative", "repeats"), r"not a key \(valid: enabled\)"),
        ({"relative": 3}, ("probes", "relative"), "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_setting_of_a_probe_is_refused_by_its_whole_path(
    tables: dict[str, Any], place: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        EvaluateConfig.model_validate({"probes": tables})
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_the_default_probes_run_unless_they_are_switched_off() -> None:
    assert {name: s.enabled for name, s in EvaluateConfig().probes.items()} == {"relative": True, "latency": True}
    one = EvaluateConfig.model_validate({"probes": {"latency": {"enabled": False}}})
    assert {name: s.enabled for name, s in one.probes.items()} == {"relative": True, "latency": False}
    again = EvaluateConfig.model_validate_json(one.model_dump_json())
    assert again == one
    assert again.probes["latency"] == one.probes["latency"]


def test_probes_that_only_observe_are_not_identity_and_everything_else_is() -> None:
    base = EvaluateConfig().identity()
    for table in ({"latency": {"enabled": False}}, {"latency": {"repeats": 1}}, {"relative": {"enabled": True}}):
        assert EvaluateConfig.model_validate({"probes": table}).identity() == base
    assert EvaluateConfig.model_validate({"probes": {"relative": {"enabled": False}}}).identity() != base
    for change in ({"batch_tokens": 512}, {"tasks": {"items": 8}}, {"max_documents": 5}, {"bootstrap_seed": 1}):
        assert EvaluateConfig.model_validate(change).identity() != base


def test_every_field_has_a_description() -> None:
    for model in (
        EvaluateConfig,
        *(type(section) for section in (EvaluateConfig().tasks, *EvaluateConfig().probes.values())),
    ):
        assert all(field.description for field in model.model_fields.values())


def test_planning_and_tables_import_no_torch() -> None:
    code = (
        "import sys; import pipelines.evaluation.config, pipelines.measure.intervals;"
        "sys.exit(any(name in sys.modules for name in ('torch._C', 'transformers', 'lm_eval')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
