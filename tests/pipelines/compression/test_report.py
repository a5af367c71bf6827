"""The report's schema: what was written is read back, and what is damaged is refused with its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.compression.report import (
    CachedLayer,
    CacheErrors,
    Comparison,
    CompressionReport,
    CutLayer,
    Measurement,
    PackedLayer,
    Totals,
    WeightErrors,
)
from pipelines.core.errors import IntegrityError
from pipelines.measure.intervals import Interval

ONE = Interval(1.0, 0.5, 1.5)
ROW = Measurement(ratio=ONE, versus_variant=ONE, nats_per_token=ONE, perplexity_ratio=ONE, bytes=9)
ERRORS = CacheErrors(keys=0.1, values=0.2)
LAYERS = {
    "packed": PackedLayer(shape=(2, 3), stored_bits=24, bits_per_weight=4.0, baselines={"rtn": 0.5}),
    "cut": CutLayer(groups=[0, 1], neurons_removed=[]),
    "cached": CachedLayer(keys=0.1, values=0.2, baselines={"uniform": ERRORS}),
}


def report() -> CompressionReport:
    """One with a layer of every kind."""
    comparison = Comparison(
        split="validation",
        unit="documents",
        items=4,
        scored_tokens=90,
        base_nats_per_token=ONE,
        variant=ROW,
        baselines={"rtn": ROW},
    )
    return CompressionReport(
        method="gptq",
        parameters={"bits": 4},
        layout="compressed-tensors",
        loads_with="transformers",
        totals=Totals(layers=1, bytes=10, base_bytes=20, ratio=2.0),
        errors=WeightErrors(weight=0.1),
        layers=LAYERS,
        comparison=comparison,
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report().write(tmp_path)
    assert CompressionReport.read(tmp_path) == report()
    assert {name: type(layer) for name, layer in CompressionReport.read(tmp_path).layers.items()} == {
        name: type(layer) for name, layer in LAYERS.items()
    }


def test_the_summary_is_json_without_the_layers() -> None:
    told = report().summary()
    assert json.loads(json.dumps(told)) == told
    assert set(told) == {"method", "parameters", "layout", "totals", "errors", "comparison"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "has format None"),
        ('{"method": "rtn"}', "has format None"),
        ('{"format": 2}', "has format 2; this checkout reads 1"),
        ('{"format": 1, "method": "rtn"}', "is damaged: parameters: Field required"),
    ],
)
def test_a_damaged_report_is_refused_with_its_file(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "compression.json").write_text(content)
    with pytest.raises(IntegrityError, match=message) as error:
        CompressionReport.read(tmp_path)
    assert str(tmp_path / "compression.json") in str(error.value)


def test_a_key_that_the_schema_does_not_have_is_refused(tmp_path: Path) -> None:
    report().write(tmp_path)
    path = tmp_path / "compression.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"totals": content["totals"] | {"parent_bytes": 3}}))
    with pytest.raises(IntegrityError, match=r"totals\.parent_bytes"):
        CompressionReport.read(tmp_path)
