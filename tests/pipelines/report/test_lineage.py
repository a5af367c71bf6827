"""The lineage picture: edges follow the configuration, a variant of a variant included."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

from pipelines.core.artifact import Artifact
from pipelines.report import lineage


def test_edges_lead_from_the_corpus_to_promote() -> None:
    names = ["prepare", "pretrain", "evaluate.pretrain", "compress.a", "evaluate.a", "promote"]
    assert set(lineage.edges(names, {"compress": [{"name": "a", "from": ""}]})) == {
        ("corpus", "prepare"),
        ("prepare", "pretrain"),
        ("pretrain", "evaluate.pretrain"),
        ("pretrain", "compress.a"),
        ("compress.a", "evaluate.a"),
        ("evaluate.pretrain", "promote"),
        ("evaluate.a", "promote"),
    }


def test_a_variant_of_a_variant_hangs_on_its_own_base() -> None:
    config = {"compress": [{"name": "low-rank", "from": ""}, {"name": "int8", "from": "low-rank"}]}
    edges = lineage.edges(["pretrain", "compress.low-rank", "compress.int8"], config)
    assert ("compress.low-rank", "compress.int8") in edges
    assert ("pretrain", "compress.int8") not in edges


def test_a_part_of_the_graph_has_no_loose_ends() -> None:
    assert lineage.edges(["prepare"], {}) == [("corpus", "prepare")]


def test_the_picture_names_every_node_with_fingerprint_and_digest(
    record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    svg = lineage.draw(record, artifacts)
    texts = {element.text for element in ET.fromstring(svg).iter("text")}
    for name, entry in record["nodes"].items():
        assert name.rpartition(".")[2] in texts
        assert f"print {entry['fingerprint'][:12]}" in texts
        assert f"digest {artifacts[name].digest[:12]}" in texts
    assert "DVC abcdef012345" in texts


def test_nodes_that_were_not_made_are_dashed(record: dict[str, Any], artifacts: dict[str, Artifact]) -> None:
    del artifacts["promote"], artifacts["pretrain"]
    assert lineage.draw(record, artifacts).count('class="node missing"') == 2


def test_boxes_lie_apart(record: dict[str, Any], artifacts: dict[str, Artifact]) -> None:
    for number in range(7):
        record["nodes"][f"compress.{number}"] = {"stage": "compress", "fingerprint": "f", "state": "waits"}
    root = ET.fromstring(lineage.draw(record, artifacts))
    boxes = [tuple(float(box.get(key, "")) for key in ("x", "y", "width", "height")) for box in root.iter("rect")]
    assert len(boxes) == len(record["nodes"]) + 1
    width, height = map(float, root.get("viewBox", "").split()[2:])
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 0
        assert x + w <= width
        assert y >= 0
        assert y + h <= height
        assert all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in boxes[:index])
