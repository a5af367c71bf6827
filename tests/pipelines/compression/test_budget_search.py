"""The search: right against trying everything, deterministic, resumable, and blind to the test split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from models.architectures.config import IGNORED
from models.compression import search as method
from pipelines.compression import budget_search, calibration
from pipelines.compression.config import CompressConfig
from pipelines.compression.report import Trial
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError
from pipelines.core.stage import Progress, StageContext
from pipelines.measure.intervals import Interval
from pipelines.modelio.load import load_model
from tests.pipelines.compression.conftest import text_of

QUICK = {"samples": 32, "baseline_documents": 0}
TABLE = {"method": "search", "bits": [2, 3, 4, 8], "group_sizes": [0], "sequences": 64} | QUICK
BUDGET = 1.008
ANY = Trial(method="rtn", bits=4, group_size=0, bytes=1000, ratio=Interval(1.0, 0.99, 1.005), kl_nats=0.01)


def changed(trial: Trial, **changes: Any) -> Trial:
    return trial.model_copy(update=changes)


@pytest.mark.parametrize("bits", [(4,), (2, 8), (8, 4, 3, 2), (2, 3, 4, 5, 6, 7, 8)])
def test_bisection_finds_what_a_scan_finds_with_fewer_questions(bits: tuple[int, ...]) -> None:
    for least in (2, 3, 4, 5, 8, 9):
        asked: list[int] = []

        def fits(width: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(width)
            return width >= least

        expected = next((width for width in sorted(bits) if width >= least), None)
        assert budget_search.smallest_within(bits, fits) == expected
        assert len(asked) <= len(bits).bit_length()
        assert len(asked) == len(set(asked))


def test_both_budgets_bind_and_the_upper_end_of_the_interval_counts() -> None:
    config = method.Config(max_bits_per_byte_ratio=1.006, max_kl_nats=0.02)
    assert budget_search.within(ANY, config)
    assert not budget_search.within(changed(ANY, kl_nats=0.03), config)
    assert not budget_search.within(changed(ANY, ratio=Interval(1.0, 0.99, 1.007)), config)


def test_the_smallest_within_wins_and_among_equals_the_better() -> None:
    config = method.Config(max_bits_per_byte_ratio=1.01)
    worse = changed(ANY, bytes=900, ratio=Interval(1.008, 1.0, 1.009))
    better = changed(worse, method="gptq", ratio=Interval(1.001, 1.0, 1.002))
    outside = changed(ANY, bytes=100, ratio=Interval(1.02, 1.0, 1.03))
    assert budget_search.best([ANY, worse, better, outside], config) is better
    assert budget_search.best([outside], config) is None


def go(bench: Any, folder: Path, *, prepare: Artifact | None = None, report: Any = None, **changes: Any) -> Any:
    """Run the stage and return compression.json."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    context = StageContext(node="compress.search", scratch=folder / "scratch", compute=ComputeConfig(device="cpu"))
    context = replace(context, report=report) if report else context
    config = CompressConfig.model_validate(TABLE | {"max_bits_per_byte_ratio": BUDGET} | changes)
    run(config, {"prepare": prepare or bench.prepare, "model": bench.parent}, folder / "out", context)
    return json.loads((folder / "out" / "compression.json").read_text())


@pytest.fixture(scope="module")
def found(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A finished search: its report and its folder."""
    folder = tmp_path_factory.mktemp("search")
    return go(bench, folder), folder / "out"


@pytest.mark.slow
def test_the_winner_is_the_one_that_trying_everything_finds(found: Any, bench: Any, tmp_path: Path) -> None:
    """Every width of both methods, measured here by other means: whole models, over the same validation documents."""
    report, _ = found
    tokens_NT = calibration.sample_tokens(bench.prepare.path, samples=64, seed=0, masked=False, split="validation")
    text = text_of(bench.prepare, tokens_NT)

    @torch.no_grad()
    def loss(model: Any) -> float:
        nats = 0.0
        for batch in text:
            logits = model(input_ids=torch.from_numpy(batch.tokens_BL)).logits.flatten(0, 1)
            labels = torch.from_numpy(batch.labels_BL).flatten()
            nats += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        return nats

    base = loss(load_model(bench.parent.path / "model"))
    ratios: dict[tuple[str, int], float] = {}
    for name in ("rtn", "gptq"):
        for bits in (2, 3, 4, 8):
            out = tmp_path / f"{name}-{bits}"
            out.mkdir()
            table = {"method": name, "bits": bits, "group_size": 0} | QUICK
            context = StageContext(node="compress.c", scratch=tmp_path, compute=ComputeConfig(device="cpu"))
            inputs = {"prepare": bench.prepare, "model": bench.parent}
            run(CompressConfig.model_validate(table), inputs, out, context)
            ratios[name, bits] = loss(load_model(out / "model")) / base
    measured = {(t["method"], t["bits"]): t["ratio"]["value"] for t in report["search"]["trials"]}
    assert len(measured) < len(ratios)
    for key, value in measured.items():
        assert value == pytest.approx(ratios[key], abs=1e-5)
    failed = {(t["method"], t["bits"]) for t in report["search"]["trials"] if t["ratio"]["high"] > BUDGET}
    for (name, bits), value in ratios.items():
        if bits < report["search"]["chosen"]["bits"]:
            over = [ratios[key] for key in failed if key[0] == name and key[1] >= bits]
            assert over, "each smaller candidate failed, or a wider one of its method did"
            assert value >= min(over), "and quality was monotone, as bisection supposes"


def test_the_variant_is_the_chosen_method_and_keeps_the_budget(found: Any, bench: Any) -> None:
    report, out = found
    chosen = report["search"]["chosen"]
    assert (report["method"], report["parameters"]["bits"]) == (chosen["method"], chosen["bits"])
    assert report["totals"]["bytes"] == chosen["bytes"]
    assert chosen["ratio"]["high"] <= BUDGET
    assert any(t["ratio"]["high"] > BUDGET for t in report["search"]["trials"]), "a smaller one was tried and refused"
    assert (out / "model" / "config.json").is_file()


def test_a_search_that_was_killed_goes_on_to_the_same_variant(found: Any, bench: Any, tmp_path: Path) -> None:
    whole, out = found
    seen: list[str] = []

    def die(progress: Progress) -> None:
        if progress.unit == "candidates":
            seen.append(progress.message)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(bench, tmp_path, report=die)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("trial-*.json")}
    shutil.rmtree(tmp_path / "out")
    assert len(kept) == 2
    assert go(bench, tmp_path) == whole
    for name, written in kept.items():
        assert (tmp_path / "scratch" / name).stat().st_mtime_ns == written, "measured once"
    weights = [folder / "model" / "model.safetensors" for folder in (out, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_test_split_chooses_nothing(found: Any, bench: Any, tmp_path: Path) -> None:
    """The search finds the same child when the test split does not exist."""
    shutil.copytree(bench.prepare.path, tmp_path / "build")
    index = json.loads((tmp_path / "build" / "index.json").read_text())
    for shard in index["splits"].pop("test")["shards"]:
        (tmp_path / "build" / shard["file"]).unlink()
    (tmp_path / "build" / "index.json").write_text(json.dumps(index))
    names = {"stage": "prepare", "node": "prepare", "identity": {}, "parents": {}, "summary": {}}
    blind = artifact.publish(tmp_path / "build", tmp_path / "prepare", **names)
    assert go(bench, tmp_path / "run", prepare=blind) == found[0]


def test_a_budget_that_nothing_keeps_is_refused_with_the_nearest(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of 1 candidates .* nearest is rtn 2 bit, a row"):
        go(bench, tmp_path, methods=["rtn"], bits=[2], max_bits_per_byte_ratio=1.0001)


def test_divergence_is_that_of_the_definition_and_zero_for_the_parent(
    bench: Any, small: Callable[..., Any], opened: Any
) -> None:
    folders = [bench.parent.path / "model", small(width=64).parent.path / "model"]
    parent, other = map(load_model, folders)
    tokens_NT = bench.held_BT[:3].numpy()
    text = budget_search.SearchText(opened(bench, TABLE), text_of(bench.prepare, tokens_NT))
    nats, kl = text.compare(folders[0])
    assert kl == 0.0
    assert np.array_equal(nats[0], nats[1])
    nats, kl = text.compare(folders[1])
    with torch.no_grad():
        p, q = (m(input_ids=bench.held_BT[:3]).logits[:, :-1].double().softmax(-1) for m in (parent, other))
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    assert nats[0].sum() / (3 * 95) == pytest.approx(
        float(torch.nn.functional.nll_loss(p.log().flatten(0, 1), bench.held_BT[:3, 1:].flatten())), rel=1e-6
    )


def test_an_encoder_is_searched_on_hidden_tokens(small: Callable[..., Any], tmp_path: Path) -> None:
    """Untrained: any width keeps the loss, so the narrowest wins; what counts is that the family works."""
    model = small(family="encoder")
    build = tmp_path / "build"
    shutil.copytree(model.prepare.path, build)
    index = json.loads((build / "index.json").read_text())
    index["splits"]["validation"] = index["splits"]["train"]
    (build / "index.json").write_text(json.dumps(index))
    names = {"stage": "prepare", "node": "prepare", "identity": {}, "parents": {}, "summary": {}}
    prepare = artifact.publish(build, tmp_path / "prepare", **names)
    report = go(model, tmp_path / "run", prepare=prepare, methods=["rtn"], bits=[4, 8], max_bits_per_byte_ratio=1.5)
    assert report["search"]["chosen"]["bits"] == 4
    assert report["search"]["chosen"]["kl_nats"] > 0
