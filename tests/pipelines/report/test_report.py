"""The page as a whole: every section, nothing from outside, nothing unescaped, whatever the run reached."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipelines import report
from pipelines.core.artifact import Artifact

Render = Callable[[dict[str, Any], dict[str, Artifact]], str]
SECTIONS = {
    "headline",
    "gate",
    "evaluation",
    "training",
    "throughput",
    "data",
    "lineage",
    "environment",
    "configuration",
}
VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Page(HTMLParser):
    """Collects tags, ids and addresses, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "src", "xlink:href", "action", "data"}:
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_has_every_section(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    page = Page(render(record, artifacts))
    assert set(page.ids) >= SECTIONS
    assert page.open == []
    assert "did not reach" not in page.text


def test_the_headline_says_who_won_how_good_and_how_small(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    text = Page(render(record, artifacts)).text.partition("Gate decision")[0]
    assert "<b>int4 is champion: ingot-demo version 7" in text
    assert "75.0 %" in text  # 4 MB to 1 MB
    assert "1 MB instead of 4 MB" in text
    assert "2.100" in text
    assert "[2.000, 2.200]" in text


def test_nothing_is_fetched_from_elsewhere(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    text = render(record, artifacts)
    page = Page(text)
    assert page.addresses == []
    assert page.tags.isdisjoint({"script", "link", "iframe", "img"})
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_the_tracking_link_is_the_only_address(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    record["tracking_url"] = "http://127.0.0.1:5000/#/runs/1"
    assert Page(render(record, artifacts)).addresses == ["http://127.0.0.1:5000/#/runs/1"]


def test_names_and_messages_of_users_are_text_never_markup(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    record |= {"recipe": attack, "overrides": [attack], "error": attack, "status": "failed", "id": attack}
    record["config"][attack] = attack
    text = render(record, artifacts)
    assert attack not in text
    page = Page(text)
    assert page.tags.isdisjoint({"script", "img", "poems"})
    assert attack in page.text
    assert "letters & <poems>" in page.text


def test_a_refused_gate_shows_its_reason_in_full(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    reason = "the gate refused <b>int4\ncheck           found\nbytes / base  1.5    BROKEN"
    record |= {"status": "refused", "error": reason}
    record["nodes"]["promote"]["state"] = "failed"
    del artifacts["promote"]
    text = Page(render(record, artifacts)).text
    assert "The gate refused: no new champion" in text
    assert reason in text
    assert "75.0 %" in text  # the smallest variant is shown where nobody was put forward


@pytest.mark.parametrize("kept", [(), ("prepare",), ("prepare", "pretrain"), ("evaluate.<b>int4",), ("promote",)])
def test_what_a_run_did_not_reach_is_said_not_an_error(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact], kept: tuple[str, ...]
) -> None:
    record["status"] = "failed"
    page = Page(render(record, {name: artifacts[name] for name in kept}))
    assert set(page.ids) >= SECTIONS
    assert ("No data was prepared" in page.text) == ("prepare" not in kept)
    assert ("No model was trained" in page.text) == ("pretrain" not in kept)
    assert ("No model was evaluated" in page.text) == ("evaluate.<b>int4" not in kept)


def test_any_one_artifact_may_be_alone_or_missing(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    for count in (1, len(artifacts) - 1):
        for names in combinations(artifacts, count):
            assert Page(render(record, {name: artifacts[name] for name in names})).open == []


def test_the_report_of_a_run_of_an_earlier_version_still_renders(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    """Its evaluations call the base model parent, and its compression reports have another schema."""
    variant = artifacts["evaluate.<b>int4"].path / "evaluation.json"
    variant.write_text(variant.read_text().replace('"versus_base"', '"versus_parent"'))
    earlier = {"method": "rtn", "arms": {}, "totals": {"bits_per_weight": 4.25}}
    (artifacts["compress.<b>int4"].path / "compression.json").write_text(json.dumps(earlier))
    page = Page(render(record, artifacts))
    assert page.open == []
    assert set(page.ids) >= SECTIONS
    assert "<b>int4 is champion" in page.text


def test_a_broken_condition_is_named_and_marked(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    path = artifacts["promote"].path / "decision.json"
    refused = (
        path.read_text().replace('"passed": true', '"passed": false').replace('"broken": []', '"broken": ["size"]')
    )
    path.write_text(refused.replace('"accepted": true', '"accepted": false'))
    text = render(record, artifacts)
    assert 'class="broken"' in text
    assert "Broken: size." in text
    assert "✗ no" in text


def test_secrets_of_the_configuration_stay_out(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    record["error"] = "cannot reach http://ada:lovelace99@example.org/"
    record["overrides"] = ["tracking.uri=http://ada:byron1815@example.org/"]
    text = render(record, artifacts)
    assert "hunter2hunter2" not in text
    assert "byron1815" not in text
    assert "lovelace99" not in text
    assert "tracking.password" in text


def test_secrets_of_the_environment_stay_out_wherever_they_turn_up(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "c4n4ry<&>'Zq81"  # escaped, it would not be found in the page any more
    monkeypatch.setenv("SERVICE_PASSWORD", secret)
    record["error"] = f"the server said {secret}"
    record["config"]["tracking"]["experiment"] = secret
    record["nodes"]["prepare"]["message"] = secret
    rows = [{"prompt": f"To {secret}", "text": f"or {secret}"}]
    (artifacts["evaluate.pretrain"].path / "samples.json").write_text(json.dumps(rows))
    text = render(record, artifacts)
    assert "c4n4ry" not in text
    assert "the server said ***" in text
    assert "To ***" in text


def test_dark_and_print_have_their_own_style(
    render: Render, record: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    text = render(record, artifacts)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "&#3" not in text.partition("</style>")[0]  # the style sheet is not escaped as if it were text


def test_the_report_loads_neither_torch_nor_mlflow_nor_prefect() -> None:
    # `torch` itself may stand there as a module that is loaded when first used; `torch._C` says that it was.
    code = "import sys, pipelines.report; print({'torch._C', 'mlflow', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_the_base_and_the_candidate_write_stands_side_by_side(
    record: dict[str, Any], artifacts: dict[str, Artifact], render: Render
) -> None:
    for node, text in (("evaluate.pretrain", "the king"), ("evaluate.<b>int4", "the <i>queen")):
        rows = [{"prompt": "Enter", "text": text}]
        (artifacts[node].path / "samples.json").write_text(json.dumps(rows))
    page = Page(render(record, artifacts))
    assert "samples" in page.ids
    assert re.search(r"Enter\s+pretrain the king\s*<b>int4 the <i>queen", page.text)


def test_an_encoders_guesses_are_shown_with_the_answer(
    record: dict[str, Any], artifacts: dict[str, Artifact], render: Render
) -> None:
    words = [{"text": "king", "probability": 0.5}, {"text": "sea", "probability": 0.25}]
    rows = [{"prompt": "the [MASK] is dead", "masks": [words], "answer": "king"}]
    (artifacts["evaluate.pretrain"].path / "samples.json").write_text(json.dumps(rows))
    assert "king 0.500, sea 0.250 (it was: king)" in Page(render(record, artifacts)).text


def test_the_page_says_how_the_champion_is_loaded_and_where_mlflow_is(
    record: dict[str, Any], artifacts: dict[str, Artifact], render: Render
) -> None:
    text = Page(render(record | {"tracking_uri": "sqlite:///store/mlflow.db"}, artifacts)).text
    assert "ingot export champion /tmp/champion" in text
    assert "AutoModelForCausalLM.from_pretrained('/tmp/champion')" in text
    assert "models:/ingot-demo@champion" in text
    assert "mlflow server --backend-store-uri sqlite:///store/mlflow.db" in text


def test_a_task_at_chance_is_called_uninformative(
    record: dict[str, Any], artifacts: dict[str, Artifact], render: Render
) -> None:
    assert "Uninformative" not in render(record, artifacts)
    path = artifacts["evaluate.pretrain"].path / "evaluation.json"
    told = json.loads(path.read_text())
    told["tasks"]["cloze"]["informative"] = False
    path.write_text(json.dumps(told))
    assert "Uninformative: cloze." in render(record, artifacts)


def test_the_curves_of_earlier_runs_stand_beside_this_runs(
    record: dict[str, Any], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    for artifact in artifacts.values():
        if (metrics := artifact.path / "metrics.jsonl").exists():
            rows = [json.loads(line) for line in metrics.read_text().splitlines()]
            metrics.write_text("\n".join(json.dumps(row | {"tokens": 512 * row["step"]}) for row in rows))
    path = tmp_path / "page.html"
    report.write(record, artifacts, path, {"champion v3": artifacts["pretrain"]})
    text = path.read_text()
    assert ">this run</text>" in text
    assert ">champion v3</text>" in text
    assert ">tokens</text>" in text


def test_texts_of_models_stay_text(record: dict[str, Any], artifacts: dict[str, Artifact], render: Render) -> None:
    rows = [{"prompt": "To <be>", "text": "or\n</p><script>no</script>"}]
    (artifacts["evaluate.pretrain"].path / "samples.json").write_text(json.dumps(rows))
    learned = [{"step": step, "prompt": "Now <is>", "text": f"<script>{step}</script>"} for step in range(1, 10)]
    (artifacts["pretrain"].path / "samples.jsonl").write_text("\n".join(map(json.dumps, learned)) + "\n")
    page = Page(render(record, artifacts))
    assert "script" not in page.tags
    assert page.open == []
    assert "or\n</p><script>no</script>" in page.text
    assert "To <be>" in page.text
    assert "Now <is>" in page.text
    shown = [int(step) for step in re.findall(r"step (\d) <script>", page.text)]
    assert (shown[0], shown[-1], len(shown)) == (1, 9, 6)
