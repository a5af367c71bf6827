"""Variants by method and bits: ratios to the base, the frontier, baselines at a variant's bytes, and the picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import report
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.report import compression

INTERVAL = {"value": 1.2, "low": 1.15, "high": 1.25}


def model(name: str, kind: str, size: int, ratio: float | None, decode: float | None) -> dict[str, Any]:
    """A row of the comparison."""
    spread = None if ratio is None else 0.01
    return {
        "model": name,
        "kind": kind,
        "size_bytes": size,
        "ratio": ratio,
        "ratio_low": None if ratio is None or spread is None else ratio - spread,
        "ratio_high": None if ratio is None or spread is None else ratio + spread,
        "prefill_ms": 1.0,
        "decode_ms": decode,
        "peak_memory_bytes": size * 2,
    }


MODELS = [
    model("pretrain", "base", 4000, None, 10.0),
    model("rtn8", "variant", 1200, 1.0, 8.0),
    model("rtn4", "variant", 700, 1.08, None),
    model("gptq4", "variant", 700, 1.02, 20.0),
    model("gzip", "baseline", 0, None, None),
]


def measured(size: int | None = None, **sizes: float) -> dict[str, Any]:
    """A measurement of a model with layers of so many bytes."""
    made = dict.fromkeys(("ratio", "versus_variant", "nats_per_token", "perplexity_ratio"), INTERVAL)
    return made | ({} if size is None else {"bytes": size}) | sizes


def compared(*, variant: dict[str, Any] | None = None, **baselines: dict[str, Any]) -> dict[str, Any]:
    """A comparison, as a part of compression.json."""
    text = {"split": "validation", "unit": "documents", "items": 4, "scored_tokens": 90}
    sides = {"variant": variant or measured(500), "baselines": baselines, "base_nats_per_token": INTERVAL}
    return {"comparison": text | sides}


@pytest.fixture
def variants(tmp_path: Path) -> Callable[..., dict[str, Artifact]]:
    """Return a function that makes compress artifacts of name -> further keys of compression.json."""

    def make(**reports: dict[str, Any]) -> dict[str, Artifact]:
        made = {}
        for name, extra in reports.items():
            build = tmp_path / f"build-{name}"
            build.mkdir()
            bits = 8 if name.endswith("8") else 4
            sizes = {"layers": 1, "bytes": 200 * bits, "base_bytes": 4000, "ratio": 20 / bits}
            totals = sizes | {"bits_per_weight": bits + 0.25, "layer_bytes": 125 * bits}
            content = {"format": 1, "method": name[:-1], "parameters": {}, "layout": "x", "layers": {}}
            content |= {"loads_with": "transformers", "totals": totals | extra.pop("totals", {})}
            (build / "compression.json").write_text(json.dumps(content | extra))
            names = {"stage": "compress", "node": f"compress.{name}", "identity": {}, "parents": {}, "summary": {}}
            made[f"compress.{name}"] = artifact.publish(build, tmp_path / name, **names)
        return made

    return make


def test_a_row_holds_method_bits_and_ratios_to_the_base(variants: Any) -> None:
    found = compression.rows(MODELS, variants(rtn8={}, rtn4={}, gptq4={}))
    assert [row["model"] for row in found] == ["rtn4", "gptq4", "rtn8"]
    eight = found[-1]
    assert (eight["method"], eight["bits_per_weight"]) == ("rtn", 8.25)
    assert eight["size_ratio"] == 0.3
    assert eight["decode_ratio"] == 0.8
    assert eight["memory_ratio"] == 0.3
    assert found[0]["decode_ratio"] is None, "not measured is not zero"


def test_only_variants_that_nothing_equals_in_both_are_best(variants: Any) -> None:
    found = compression.rows(MODELS, variants(rtn8={}, rtn4={}, gptq4={}))
    assert {row["model"] for row in found if row["best"]} == {"gptq4", "rtn8"}


def test_a_variant_that_was_not_measured_has_no_row(variants: Any) -> None:
    assert compression.rows(MODELS, variants(hqq4={})) == []
    assert compression.picture([]) == ""


def test_sizes_of_one_method_are_joined_and_others_are_not(variants: Any) -> None:
    svg = compression.picture(compression.rows(MODELS, variants(rtn8={}, rtn4={}, gptq4={})))
    (line,) = re.findall(r'<polyline points="([^"]+)" class="method"', svg)
    xs = [float(point.split(",")[0]) for point in line.split()]
    assert len(xs) == 2
    assert xs[0] < xs[1], "from the smaller to the larger"


def test_baselines_are_marks_where_the_variant_would_lie_with_their_bytes(variants: Any) -> None:
    """A baseline of as many layer bytes stands straight above its variant; one of more bytes to the right of it."""
    found = compression.rows(MODELS, variants(gptq4=compared(rtn=measured(500), random=measured(700)), rtn8={}))
    svg = compression.picture(found, "gptq4")
    found_marks = re.findall(r'<path d="M([\d.]+) ([^"]*)" class="baseline k\d"><title>([^<]+)', svg)
    marks = {tip.split()[0]: float(x) for x, _, tip in found_marks}
    shapes = {re.sub(r"^[\d.]+", "", path) for _, path, _ in found_marks}
    variant = next(
        float(x) for x, tip in re.findall(r'<circle cx="([\d.]+)"[^>]*><title>([^<]+)', svg) if "gptq4" in tip
    )
    assert marks["rtn"] == pytest.approx(variant, abs=0.11)
    assert marks["random"] > variant + 5
    assert len(shapes) == 2, "told apart without colour"
    assert all(f">baseline: {name}</text>" in svg for name in marks)
    assert svg.count('class="tie"') == 2
    assert svg.count('class="ring"') == 1, "the candidate"


CACHES = {"pretrain": 100.0, "rtn8": 100.0, "kvq4": 20.0}
CACHES_COMPARED = compared(rtn=measured(cache_bytes_per_token=31.0), variant=measured(cache_bytes_per_token=21.0))


def coded(variants: Any) -> tuple[list[dict[str, Any]], dict[str, Artifact]]:
    """A base, a variant with small weights and one with a coded cache, which is no smaller on disk."""
    models = [*MODELS[:2], model("kvq4", "variant", 4010, 1.01, None)]
    models = [row | {"cache_bytes_per_token": CACHES[row["model"]]} for row in models]
    totals = {"bits_per_weight": None, "bits_per_cached_number": 3.4}
    return models, variants(rtn8={}, kvq4=CACHES_COMPARED | {"totals": totals})


def test_a_coded_cache_counts_where_caches_count(variants: Any) -> None:
    """On disk it is the largest and dominated; with the cache of 400 tokens it is the smallest."""
    models, artifacts = coded(variants)
    disk, both = (compression.rows(models, artifacts, tokens) for tokens in (0, 400))
    assert [row["model"] for row in disk] == ["rtn8", "kvq4"]
    assert [row["footprint_bytes"] for row in disk] == [1200, 4010]
    assert {row["model"] for row in disk if row["best"]} == {"rtn8"}
    assert [(row["model"], row["footprint_bytes"]) for row in both] == [("kvq4", 12010.0), ("rtn8", 41200.0)]
    assert both[0]["footprint_ratio"] == pytest.approx(12010 / 44000)
    assert both[0]["bits_per_cached_number"] == 3.4
    assert {row["model"] for row in both if row["best"]} == {"kvq4", "rtn8"}


def test_a_baseline_of_a_quantized_cache_stands_where_its_cache_puts_it(variants: Any) -> None:
    models, artifacts = coded(variants)
    found = compression.rows(models, artifacts, 400)
    assert compression._size_with(found[0]["baselines"]["rtn"], found[0]) == 12010 + 400 * 10
    svg = compression.picture(found)
    assert "bytes on disk and of a cache of 400 tokens" in svg
    assert svg.count('class="baseline k0"><title>') == 1
    assert "of a cache" not in compression.picture(compression.rows(models, artifacts))


@pytest.mark.parametrize(
    ("files", "wanted", "counted"),
    [
        (["config.json"], 0, 0),
        (["config.json"], 300, 300),
        (["kv_cache.safetensors"], 0, 4096),
        (["kv_cache.safetensors"], 300, 300),
    ],
)
def test_the_cache_counts_at_the_gates_tokens_or_where_a_variant_codes_it(
    files: list[str], wanted: int, counted: int, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / "b" / "model").mkdir(parents=True)
        (tmp_path / "b" / "model" / file).write_text("{}")
    names = {"stage": "compress", "node": "compress.x", "identity": {}, "parents": {}, "summary": {}}
    made = {"compress.x": artifact.publish(tmp_path / "b", tmp_path / "f", **names)}
    record = {"config": {"promote": {"cache_tokens": wanted}}}
    assert compression.counted_tokens(record, made) == counted


def test_the_page_and_the_logged_table_show_the_variant_and_its_baselines(
    artifacts: dict[str, Artifact], record: dict[str, Any], tmp_path: Path
) -> None:
    node = "compress.<b>int4"
    path = artifacts[node].path / "compression.json"
    content = json.loads(path.read_text())
    content["totals"]["bits_per_weight"] = 4.25
    path.write_text(json.dumps(content | compared(random=measured(9))))
    report.write(record, artifacts, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="compression">') : page.index('<section id="training">')]
    assert "4.25" in section
    assert "random 1.2" in section
    assert "<b>int4" not in section
    assert report.write_pareto(record, artifacts, tmp_path / "pareto.json")
    (row,) = json.loads((tmp_path / "pareto.json").read_text())
    assert (row["model"], row["baselines"]["random"]["ratio"]) == ("<b>int4", INTERVAL)
    assert not report.write_pareto(record, {}, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
