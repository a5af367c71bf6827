"""Children by method and bits: ratios to the parent, the frontier, null arms at a child's bytes, and the picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import artifact, report
from pipelines.artifact import Artifact
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
    model("pretrain", "parent", 4000, None, 10.0),
    model("rtn8", "child", 1200, 1.0, 8.0),
    model("rtn4", "child", 700, 1.08, None),
    model("gptq4", "child", 700, 1.02, 20.0),
    model("gzip", "baseline", 0, None, None),
]


@pytest.fixture
def children(tmp_path: Path) -> Callable[..., dict[str, Artifact]]:
    """Return a function that makes compress artifacts of name -> further keys of compression.json."""

    def make(**reports: dict[str, Any]) -> dict[str, Artifact]:
        made = {}
        for name, extra in reports.items():
            build = tmp_path / f"build-{name}"
            build.mkdir()
            bits = 8 if name.endswith("8") else 4
            totals = {"bits_per_weight": bits + 0.25, "layer_bytes": 125 * bits}
            content = {"method": name[:-1], "totals": totals, "not_informative": None} | extra
            (build / "compression.json").write_text(json.dumps(content))
            names = {"stage": "compress", "node": f"compress.{name}", "identity": {}, "parents": {}, "summary": {}}
            made[f"compress.{name}"] = artifact.publish(build, tmp_path / name, **names)
        return made

    return make


def test_a_row_holds_method_bits_and_ratios_to_the_parent(children: Any) -> None:
    found = compression.rows(MODELS, children(rtn8={}, rtn4={}, gptq4={}))
    assert [row["model"] for row in found] == ["rtn4", "gptq4", "rtn8"]
    eight = found[-1]
    assert (eight["method"], eight["bits_per_weight"]) == ("rtn", 8.25)
    assert eight["size_ratio"] == 0.3
    assert eight["decode_ratio"] == 0.8
    assert eight["memory_ratio"] == 0.3
    assert found[0]["decode_ratio"] is None, "not measured is not zero"


def test_only_children_that_nothing_equals_in_both_are_best(children: Any) -> None:
    found = compression.rows(MODELS, children(rtn8={}, rtn4={}, gptq4={}))
    assert {row["model"] for row in found if row["best"]} == {"gptq4", "rtn8"}


def test_a_child_that_was_not_measured_has_no_row(children: Any) -> None:
    assert compression.rows(MODELS, children(hqq4={})) == []
    assert compression.picture([]) == ""


def test_sizes_of_one_method_are_joined_and_others_are_not(children: Any) -> None:
    svg = compression.picture(compression.rows(MODELS, children(rtn8={}, rtn4={}, gptq4={})))
    (line,) = re.findall(r'<polyline points="([^"]+)" class="method"', svg)
    xs = [float(point.split(",")[0]) for point in line.split()]
    assert len(xs) == 2
    assert xs[0] < xs[1], "from the smaller to the larger"


def test_null_arms_are_diamonds_where_the_child_would_lie_with_their_bytes(children: Any) -> None:
    """An arm of as many layer bytes stands straight above its child; one of more bytes to the right of it."""
    arms = {"rtn": {"ratio": INTERVAL, "bytes": 500}, "random": {"ratio": INTERVAL, "bytes": 700}}
    found = compression.rows(MODELS, children(gptq4={"arms": arms}, rtn8={}))
    svg = compression.picture(found, "gptq4")
    diamonds = {
        tip.split()[0]: float(x) for x, tip in re.findall(r'<path d="M([\d.]+) [^"]*" class="arm"><title>([^<]+)', svg)
    }
    child = next(float(x) for x, tip in re.findall(r'<circle cx="([\d.]+)"[^>]*><title>([^<]+)', svg) if "gptq4" in tip)
    assert diamonds["rtn"] == pytest.approx(child, abs=0.11)
    assert diamonds["random"] > child + 5
    assert svg.count('class="ring"') == 1, "the candidate"


def test_the_arm_that_is_the_child_itself_is_not_drawn_twice(children: Any) -> None:
    arms = {"gptq": {"ratio": INTERVAL, "bytes": 500}}
    svg = compression.picture(compression.rows(MODELS, children(gptq4={"arms": arms})))
    assert 'class="arm"' not in svg


def test_the_page_and_the_logged_table_show_the_child_and_its_arms(
    artifacts: dict[str, Artifact], record: dict[str, Any], tmp_path: Path
) -> None:
    node = "compress.<b>int4"
    content = {
        "method": "rtn",
        "totals": {"bits_per_weight": 4.25},
        "arms": {"random": {"ratio": INTERVAL, "bytes": 9}},
    }
    (artifacts[node].path / "compression.json").write_text(json.dumps(content))
    report.write(record, artifacts, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="compression">') : page.index('<section id="training">')]
    assert "4.25" in section
    assert "random 1.2" in section
    assert "<b>int4" not in section
    assert report.write_pareto(artifacts, tmp_path / "pareto.json")
    (row,) = json.loads((tmp_path / "pareto.json").read_text())
    assert (row["model"], row["arms"]["random"]["ratio"]) == ("<b>int4", INTERVAL)
    assert not report.write_pareto({}, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
