"""Choices on validation text: the calibrator of int8, and which layers partial quantization leaves alone.

The bench has no outliers of its own, so they are put in without changing the function: four channels of both norms of
the first block are 60 times larger, and the columns that read them 60 times smaller. (In all three blocks, 9 of 21
layers had to stay for the same tolerance, not 25 %.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.compression import int8
from pipelines.compression import calibration, layer_selection, quick_eval, sequential
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.errors import ConfigError
from pipelines.modelio import meta_init
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model

TOLERANCE = 0.02


@pytest.fixture(scope="module")
def outliers(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bench model with outlier channels in front of the layers of its first block."""
    folder = tmp_path_factory.mktemp("outliers") / "build"
    model = load_model(bench.parent.path / "model")
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ):
        norm.weight.data[5:9] *= 60
        for reader in readers:
            reader.weight.data[:, 5:9] /= 60
    model.save_pretrained(folder / "model")
    for path in (bench.parent.path / "model").iterdir():
        if not (folder / "model" / path.name).exists():
            (folder / "model" / path.name).write_bytes(path.read_bytes())
    final = folder.with_name("outliers")
    return artifact.publish(folder, final, stage="pretrain", node="p", identity={}, parents={}, summary={})


@pytest.fixture(scope="module")
def walker(bench: Any, outliers: Artifact) -> sequential.Walker:
    """A walker over the model with outliers that shows inputs."""
    source = outliers.path / "model"
    tokens = calibration.sample_tokens(bench.prepare.path, samples=32, seed=0, masked=False)
    model = meta_init.build(source)
    return sequential.Walker(model, WeightReader(source), torch.device("cpu"), tokens, calibration.ROWS)


@pytest.fixture(scope="module")
def text(bench: Any, walker: sequential.Walker) -> quick_eval.Yardstick:
    """Four validation documents."""
    made = quick_eval.build(bench.prepare.path, 4, walker.model, "cpu", end="last")
    assert made is not None
    return made


@pytest.mark.slow
def test_outliers_change_nothing_until_inputs_are_rounded_with_one_scale(
    bench: Any, walker: sequential.Walker, text: quick_eval.Yardstick
) -> None:
    base = bench.loss(load_model(bench.parent.path / "model"))
    assert bench.loss(load_model(walker.folder)) == pytest.approx(base, rel=1e-3)
    plain = sequential.Walker(
        meta_init.build(bench.parent.path / "model"),
        WeightReader(bench.parent.path / "model"),
        walker.device,
        walker.tokens_NT,
        walker.rows,
    )
    ratios = []
    for one in (plain, walker):
        model, names = load_model(one.folder), sequential.targets(one.model, ())
        packed = layer_selection.everything(one, int8.Method(), int8.Config(calibrator="max"), names)
        ratios.append(math.exp(layer_selection.loss(model, packed, text, "x") - text.loss(model, "parent")))
    assert ratios[0] < 1.01
    assert ratios[1] > 1.08


@pytest.mark.slow
def test_leaving_the_most_sensitive_layers_recovers_what_random_ones_do_not(
    walker: sequential.Walker, text: quick_eval.Yardstick
) -> None:
    """Chosen on four documents, checked on others: to 1.02 with a quarter of the layers, random layers do not."""
    names, config = sequential.targets(walker.model, ()), int8.Config(calibrator="max")
    found = layer_selection.partial(walker, int8.Method(), config, names, tolerance=TOLERANCE, text=text)
    assert found["ratio_of_all"] > 1.08
    assert found["ratio"] <= 1 + TOLERANCE
    assert 1 <= len(found["kept"]) <= len(names) / 4
    assert all("layers.0" in name for name in found["kept"]), "where the outliers are"
    model, packed = load_model(walker.folder), layer_selection.everything(walker, int8.Method(), config, names)
    base = text.loss(model, "parent")

    def ratio(kept: list[str]) -> float:
        rest = {name: packed[name] for name in names if name not in kept}
        return math.exp(layer_selection.loss(model, rest, text, "child") - base)

    draws = [np.random.default_rng(n).choice(names, len(found["kept"]), replace=False).tolist() for n in range(5)]
    assert ratio(found["kept"]) == pytest.approx(found["ratio"])
    assert statistics.median(ratio(draw) for draw in draws) > 1 + 3 * TOLERANCE


@pytest.mark.slow
def test_the_stage_leaves_those_layers_as_they_are(
    bench: Any, outliers: Artifact, compress: Callable[..., Any]
) -> None:
    table = {"method": "int8", "calibrator": "max", "tolerance": TOLERANCE, "samples": 32}
    out, report = compress(bench, table, parent=outliers)
    kept = report["partial"]["kept"]
    assert kept
    assert not set(kept) & set(report["layers"])
    assert len(kept) + len(report["layers"]) == 21
    child, parent = WeightReader(out / "model"), WeightReader(outliers.path / "model")
    for name in kept:
        assert torch.equal(child.dense(f"{name}.weight"), parent.dense(f"{name}.weight"))
    base = bench.loss(load_model(outliers.path / "model"))
    assert math.exp(bench.loss(load_model(out / "model")) - base) < 1.04, "on test text, not that of the choice"


@pytest.mark.slow
def test_the_best_calibrator_is_the_one_with_the_least_loss(
    walker: sequential.Walker, text: quick_eval.Yardstick
) -> None:
    names = sequential.targets(walker.model, ())
    configs = [int8.Config.model_validate({"calibrator": name}) for name in ("max", "p99.9", "entropy")]
    best, losses = layer_selection.candidate(walker, int8.Method(), configs, names, text)
    assert losses[best.label] == min(losses.values())
    assert losses["max"] > min(losses.values()) + 0.02, "with outliers the largest value is a bad range"


def test_choices_need_validation_documents(small: Any, compress: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="validation documents"):
        compress(small(), {"method": "int8", "calibrator": "best"})
    with pytest.raises(ConfigError, match="validation documents"):
        compress(small(), {"method": "rtn", "tolerance": 0.1})


def test_a_tolerance_that_no_layer_meets_is_refused(small: Any) -> None:
    """The yardstick says that every compressed layer doubles the perplexity."""
    source = small().parent.path / "model"
    walker = sequential.Walker(meta_init.build(source), WeightReader(source), torch.device("cpu"))
    names = sequential.targets(walker.model, ())

    def judged(model: Any, _name: str) -> float:
        return sum(hasattr(module, "packed") for module in model.modules()) * math.log(2)

    from models.compression import rtn

    judge: Any = SimpleNamespace(loss=judged)
    with pytest.raises(ConfigError, match=r"2\.0000 times the parent's with one layer left"):
        layer_selection.partial(walker, rtn.Method(), rtn.Config(), names, tolerance=0.1, text=judge)
    found = layer_selection.partial(walker, rtn.Method(), rtn.Config(), names, tolerance=1.0, text=judge)
    assert len(found["kept"]) == len(names) - 1


def test_measuring_a_choice_leaves_the_model_as_it_was(small: Any, bench: Any) -> None:
    from models.compression import rtn

    source = small().parent.path / "model"
    walker = sequential.Walker(meta_init.build(source), WeightReader(source), torch.device("cpu"))
    packed = layer_selection.everything(walker, rtn.Method(), rtn.Config(bits=2), sequential.targets(walker.model, ()))
    model, tokens = load_model(source), small().held_BT
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        inside: list[torch.Tensor] = []

        def judged(inner: Any, _name: str) -> float:
            inside.append(inner(input_ids=tokens).logits)
            return 0.0

        judge: Any = SimpleNamespace(loss=judged)
        layer_selection.loss(model, packed, judge, "x")
        after = model(input_ids=tokens).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, inside[0], atol=1e-3)


def test_yardsticks_of_either_end_share_no_document_and_are_the_same_every_time(bench: Any) -> None:
    model = meta_init.build(bench.parent.path / "model")
    first, last, again = (
        quick_eval.build(bench.prepare.path, 3, model, "cpu", end=end) for end in ("first", "last", "first")
    )
    assert first is not None
    assert last is not None
    assert again is not None
    assert first.documents == last.documents == 3
    assert first.scored <= 3 * quick_eval.DOCUMENT_TOKENS
    rows = [{tuple(row) for batch in one.batches for row in batch.ids.tolist()} for one in (first, last, again)]
    assert rows[0] == rows[2]
    assert not rows[0] & rows[1]


def test_fewer_than_two_documents_are_no_yardstick(small: Any, tmp_path: Path) -> None:
    model = meta_init.build(small().parent.path / "model")
    assert quick_eval.build(tmp_path, 8, model, "cpu", end="first") is None
