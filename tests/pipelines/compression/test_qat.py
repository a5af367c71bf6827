"""Methods that train, on a tiny corpus: any engine, any optimizer, killed and resumed, stored and loaded again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from models.architectures.build import build
from models.compression import registry
from pipelines.compression import qat, qat_objective
from pipelines.compression.config import CompressConfig
from pipelines.compression.run import CompressionRun
from pipelines.compression.stage import run
from pipelines.core import artifact
from pipelines.core.artifact import Artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import ConfigError, Preempted, TransientError
from pipelines.core.stage import StageContext
from pipelines.modelio.folder import WeightReader
from pipelines.modelio.load import load_model
from pipelines.training import worker
from pipelines.training.config import PretrainConfig

PLAIN = {"engine": "plain", "world_size": 1, "zero_stage": 0, "micro_batch_size": 4, "baselines": False}
TINY = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "validate_every": 4, "validation_sequences": 7}
PRIVATE = {"method": "paretoq", "bits": 2}
TABLES: dict[str, dict[str, Any]] = {
    "binary": {"method": "paretoq", "bits": 1},
    "ternary": {"method": "paretoq", "bits": 1.58},
    "ternary5": {"method": "paretoq", "bits": 1.58, "storage": "ternary5"},
    "seq2": PRIVATE,
    "seq2-public": PRIVATE | {"storage": "public"},
    "int3": {"method": "paretoq", "bits": 3},
    "bitnet": {"method": "bitnet"},
    "bitnet-norm": {"method": "bitnet", "norm": True, "scale": "median"},
    "bitnet-wide": {"method": "bitnet", "init_from": "scratch", "widen": 2},
    "maestro": {"method": "maestro", "value_bits": 32, "penalty": 1e-3, "drawn": "one"},
    "maestro-all": {"method": "maestro", "value_bits": 32, "drawn": "all", "allocation": "uniform"},
    "maestro-svd": {"method": "maestro", "value_bits": 32, "cut": "start"},
    "sortednet": {"method": "sortednet", "depth": 2},
    "distill": {"method": "distill", "layers": 2, "features": 1.0},
    "lq_lora_tune": {"method": "lq_lora_tune", "bits": 3, "rank": 4},
    "pb_llm_tune": {"method": "pb_llm_tune"},
    "pb_llm_tune-groups": {"method": "pb_llm_tune", "salient": 0.3, "group_size": 8},
    "finetune": {"method": "finetune"},
}


EXACT = [name for name in TABLES if not name.startswith(("maestro", "lq_lora"))]
"""Factors are multiplied out when a child is loaded, which rounds differently."""


@dataclass
class Child:
    """One run of the stage."""

    out: Path

    @property
    def report(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.out / "compression.json").read_text())
        return result

    @property
    def digests(self) -> dict[str, str]:
        """Of everything but timings."""
        paths = [path for path in sorted(self.out.rglob("*")) if path.is_file() and path.name != "metrics.jsonl"]
        return {path.relative_to(self.out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def parents(prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Return an untrained parent of three layers of either family."""
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "build"
            sizes = {"width": 32, "layers": 3, "heads": 2, "ffn_width": 48, "init_std": 0.15}
            settings = PretrainConfig.model_validate({"family": name, "preset": "0.5m", "model": sizes})
            build(settings.architecture(prepared.read_json("index.json")), seed=5).save_pretrained(folder / "model")
            made[name] = artifact.publish(
                folder, folder.with_name("parent"), stage="pretrain", node="p", identity={}, parents={}, summary={}
            )
        return made[name]

    return make


Make = Callable[..., Child]


@pytest.fixture
def make(prepared: Artifact, parents: Callable[[str], Artifact], tmp_path: Path) -> Iterator[Make]:
    """Run the stage; `here` trains in this process first, so that no rank has to be started."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def go(
        table: dict[str, Any],
        *,
        name: str = "child",
        family: str = "decoder",
        here: bool = True,
        parent: Artifact | None = None,
    ) -> Child:
        place = tmp_path / name
        (place / "out").mkdir(parents=True, exist_ok=True)
        context = StageContext("compress.x", place / "scratch", compute=ComputeConfig(device="cpu"))
        trained = {} if "samples" in table else TINY
        config = CompressConfig.model_validate({**PLAIN, **trained, **table} if here else {**trained, **table})
        inputs = {"prepare": prepared, "model": parent or parents(family)}
        if here and config.parameters.steps:  # type: ignore[attr-defined]
            spec = qat.make_worker_spec(CompressionRun.open(config, inputs, place / "out", context, run))
            qat.training.write_spec(spec)
            code = worker.main([str(spec.scratch / "worker_spec.json")])
            if code:
                raise Preempted(f"exit code {code}")
        run(config, inputs, place / "out", context)
        return Child(place / "out")

    yield go
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(4, 24).unsqueeze(0)).logits
    return result


def trained_student(table: dict[str, Any], place: Path) -> Any:
    """Put the student together again, in the form that it was trained in."""
    from pipelines.training.worker_spec import WorkerSpec

    spec = WorkerSpec.model_validate_json((place / "scratch" / "train" / "worker_spec.json").read_text())
    settings = qat_objective.QatSettings.model_validate(spec.objective_settings)
    model = qat_objective.student(settings, spec.architecture, spec.config.seed)
    qat_objective.load_trained(model, spec.model)
    return model.eval()


@pytest.mark.parametrize("name", EXACT)
def test_the_stored_child_computes_exactly_what_was_trained(name: str, family: str, make: Make, tmp_path: Path) -> None:
    """Bit for bit; cut children are compared with a cut of the student."""
    child = make(TABLES[name], family=family)
    student = trained_student(TABLES[name], tmp_path / "child")
    method = registry.training(TABLES[name]["method"])
    config = CompressConfig.model_validate({**PLAIN, **TINY, **TABLES[name]}).parameters
    if method.name == "sortednet":
        method.finish(student, config)
    loaded = load_model(child.out / "model")
    loaded = load_model(child.out / "model")
    assert torch.equal(logits(loaded), logits(student))
    report = child.report
    assert report["totals"]["bytes"] == sum(p.stat().st_size for p in (child.out / "model").glob("*.safetensors"))
    kinds = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM}
    if report["loads_with"] == "transformers":
        plain = kinds[family].from_pretrained(child.out / "model", dtype=torch.float32).eval()
        assert torch.equal(logits(plain), logits(student))


def test_the_same_settings_give_the_same_child(make: Make) -> None:
    table = {"method": "distill", "layers": 2, "features": 0.5}
    assert make(table, name="one").digests == make(table, name="two").digests


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def plan(**fault: Any) -> None:
        path = tmp_path / "faults.json"
        path.write_text(json.dumps([fault]))
        monkeypatch.setenv("INGOT_FAULTS", str(path))

    return plan


LAMB_LISA = {"optimizer": "lamb", "lr": 0.01, "lisa_layers": 1, "lisa_interval": 2}


@pytest.mark.parametrize("table", [PRIVATE | LAMB_LISA, TABLES["maestro"], TABLES["sortednet"] | {"drawn": 1}])
def test_a_training_that_was_stopped_and_resumed_gives_the_same_child(
    table: dict[str, Any], make: Make, faults: Callable[..., None]
) -> None:
    quiet = make(table, name="quiet")
    faults(point="train.after_step", step=3, action="SIGTERM")
    with pytest.raises(Preempted):
        make(table, name="stopped")
    assert make(table, name="stopped").digests == quiet.digests


def test_lisa_moves_the_drawn_layer_and_what_is_outside_the_layers_only(make: Make, tmp_path: Path) -> None:
    """Scales belong to their layer: they freeze with it."""
    make(PRIVATE | LAMB_LISA | {"lisa_interval": 4}, name="lisa")
    records = (tmp_path / "lisa" / "out" / "metrics.jsonl").read_text().splitlines()
    (active,) = json.loads(records[0])["lisa/active"]
    moved = trained_student(PRIVATE, tmp_path / "lisa")
    start = untrained_student(tmp_path / "lisa")
    for name, parameter in moved.named_parameters():
        drawn = ".layers." not in name or f".layers.{active}." in name
        assert torch.equal(parameter, start[name]) != drawn, name


def untrained_student(place: Path) -> dict[str, torch.Tensor]:
    from pipelines.training.worker_spec import WorkerSpec

    spec = WorkerSpec.model_validate_json((place / "scratch" / "train" / "worker_spec.json").read_text())
    settings = qat_objective.QatSettings.model_validate(spec.objective_settings)
    model = qat_objective.student(settings, spec.architecture, spec.config.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def zeros(child: Child) -> dict[str, torch.Tensor]:
    """Return which weights of the layers are zero."""
    reader = WeightReader(child.out / "model")
    return {name: reader.dense(f"{name}.weight") == 0 for name in child.report["layers"]}


def variant_of(child: Child, name: str) -> Artifact:
    """Publish a variant, so that another can start from it."""
    final = child.out.with_name(f"{name}-published")
    shutil.copytree(child.out, final.with_name(f"{name}-copy"))
    return artifact.publish(
        final.with_name(f"{name}-copy"), final, stage="compress", node=name, identity={}, parents={}, summary={}
    )


PRUNED = {"method": "magnitude", "sparsity": 0.5, "samples": 8}


@pytest.mark.parametrize(
    ("table", "here"),
    [
        ({"method": "finetune", "engine": "deepspeed", "zero_stage": 2, "world_size": 2}, False),
        ({"method": "finetune", "optimizer": "lamb", "lr": 0.05, "weight_decay": 0.1, "lisa_layers": 1}, True),
        ({"method": "distill", "weight_decay": 0.1}, True),
    ],
)
def test_zeros_survive_training_and_rounding(table: dict[str, Any], here: bool, make: Make) -> None:
    """Prune, train, quantize: exactly the weights that were pruned are zero at the end."""
    sparse = make(PRUNED, name="sparse", here=False)
    start = zeros(sparse)
    assert all(0.45 < float(mask.double().mean()) < 0.6 for mask in start.values())
    trained = make(
        table | {"keep_zeros": True, "baselines": False}, name="t", parent=variant_of(sparse, "s"), here=here
    )
    moved = WeightReader(trained.out / "model")
    before = WeightReader(sparse.out / "model")
    for name, mask in start.items():
        assert torch.equal(zeros(trained)[name], mask), name
        if not table.get("lisa_layers"):
            after = moved.dense(f"{name}.weight")
            assert not torch.equal(after, before.dense(f"{name}.weight")), "the others train"
    base = variant_of(trained, "t")
    for rounding in ({"method": "gptq", "keep_zeros": True}, {"method": "rtn", "group_size": 0}):
        rounded = zeros(
            make(rounding | {"bits": 8, "samples": 8}, name=str(rounding["method"]), parent=base, here=False)
        )
        assert all(bool(rounded[name][mask].all()) for name, mask in start.items()), rounding


def test_without_being_told_training_fills_the_zeros(make: Make) -> None:
    sparse = make(PRUNED, name="sparse", here=False)
    trained = make({"method": "finetune"}, name="t", parent=variant_of(sparse, "s"))
    assert all(float(mask.double().mean()) < 0.1 for mask in zeros(trained).values())


def test_random_weights_have_no_zeros_to_keep() -> None:
    for method in ("finetune", "distill"):
        with pytest.raises(ValidationError, match="keep_zeros does nothing here"):
            CompressConfig.model_validate({"method": method, "keep_zeros": True, "init_from": "scratch"})


def test_without_steps_nothing_is_trained(make: Make, parents: Callable[[str], Artifact], tmp_path: Path) -> None:
    """A cut of the parent is the parent's first layers, and no rank is started for it."""
    child = make({"method": "sortednet", "depth": 1, "steps": 0}, here=False)
    assert not (tmp_path / "child" / "scratch" / "train" / "worker_spec.json").exists()
    cut, parent = load_model(child.out / "model"), load_model(parents("decoder").path / "model")
    assert cut.config.num_hidden_layers == 1
    kept = dict(cut.named_parameters())
    assert all(
        torch.equal(p, kept[n]) for n, p in parent.named_parameters() if ".layers." not in n or ".layers.0." in n
    )


def test_a_variant_stands_beside_its_baselines_in_the_report(make: Make) -> None:
    report = make({"method": "paretoq", "bits": 3, "baselines": True, "steps": 0}, here=False).report
    compared = report["comparison"]
    mine, others = compared["variant"], compared["baselines"]
    assert set(others) == {"continued fp32", "untrained", "rtn", "gptq"}
    base = compared["base_nats_per_token"]["value"]
    for row in (mine, *others.values()):
        for measure in ("nats_per_token", "ratio", "perplexity_ratio", "versus_variant"):
            assert row[measure]["low"] <= row[measure]["value"] <= row[measure]["high"]
        nats = row["nats_per_token"]["value"]
        assert row["ratio"]["value"] == pytest.approx(nats / base)
        assert row["versus_variant"]["value"] == pytest.approx(nats / mine["nats_per_token"]["value"])
        assert row["perplexity_ratio"]["value"] == pytest.approx(math.exp(nats - base))
    assert mine["bytes"] == report["totals"]["layer_bytes"] == others["rtn"]["bytes"]
    assert compared["items"] == 7


def test_a_variant_is_compared_on_as_many_documents_as_asked_for(make: Make) -> None:
    """Weights that are trained and weights that are rounded are measured by one quick evaluation."""
    table = {"method": "paretoq", "bits": 3, "steps": 0, "baselines": False}
    few = make(table | {"baseline_documents": 3}, here=False).report
    assert few["comparison"]["items"] == 3
    assert few["comparison"]["baselines"] == {}
    none = make(table | {"baseline_documents": 0}, name="none", here=False).report
    assert "comparison" not in none


def test_layers_can_be_left_alone(make: Make) -> None:
    child = make({"method": "paretoq", "bits": 2, "skip": ["*.down_proj", "model.layers.0.*"], "steps": 0}, here=False)
    rows = child.report["layers"]
    wide = {name for name, row in rows.items() if row["bits_per_weight"] == 32}
    assert wide == {n for n in rows if n.endswith("down_proj") or n.startswith("model.layers.0.")}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "sortednet", "depth": 9}, "sortednet: depth 9, but the model has 3 layers; valid: 1 to 3"),
        ({"method": "distill", "layers": 4}, "distill: layers = 4 is more than the 3 of the base"),
        ({"method": "paretoq", "lisa_layers": 7}, "lisa.layers = 7; the model has 3 layers, valid: 1 to 3"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(table: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        make({"steps": 0, **table}, here=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_under_zero_2_killed_and_resumed_train_what_one_process_does(
    make: Make, faults: Callable[..., None], tmp_path: Path
) -> None:
    """LAMB, LISA and 2-bit QAT together: the sharded weights are the plain ones, and a kill changes no byte."""
    table = PRIVATE | LAMB_LISA | {"baselines": False}
    make(table, name="plain")
    quiet = make(table, name="quiet", here=False)
    faults(point="train.after_step", rank=1, step=3, action="SIGKILL")
    with pytest.raises(TransientError):
        make(table, name="killed", here=False)
    assert make(table, name="killed", here=False).digests == quiet.digests
    plain, sharded = (trained_student(table, tmp_path / name) for name in ("plain", "quiet"))
    for (name, one), (_, other) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=0, msg=name)


def test_a_model_that_lost_heads_is_trained_further(
    prepared: Artifact, parents: Callable[[str], Artifact], make: Make, tmp_path: Path
) -> None:
    """Its one head of 16 does not make up the width of 32: the size of a head is part of the shape."""
    out = tmp_path / "pruned" / "build"
    out.mkdir(parents=True)
    context = StageContext("compress.x", tmp_path / "pruned", compute=ComputeConfig(device="cpu"))
    config = CompressConfig.model_validate({"method": "random_search", "heads": 0.5, "neurons": 0.0, "trials": 1})
    run(config, {"prepare": prepared, "model": parents("decoder")}, out, context)
    pruned = artifact.publish(
        out, out.with_name("child"), stage="compress", node="c", identity={}, parents={}, summary={}
    )
    tuned = make({"method": "finetune"}, parent=pruned)
    before, after = (dict(load_model(path / "model").named_parameters()) for path in (pruned.path, tuned.out))
    assert {name: p.shape for name, p in before.items()} == {name: p.shape for name, p in after.items()}
    assert after["model.layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_pruning_distilling_quantizing_and_coding_the_cache_follow_each_other(
    make: Make, prepared: Artifact, parents: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """The pruned child is the student, the unpruned parent its teacher; the distilled child is quantized, then coded.

    Every link keeps what the links before it did, and the last child generates with its coded cache.
    """

    def follow(table: dict[str, Any], inputs: dict[str, Artifact]) -> Artifact:
        out = tmp_path / table["method"] / "out"
        out.mkdir(parents=True)
        context = StageContext("compress.x", out.parent / "scratch", compute=ComputeConfig(device="cpu"))
        config = CompressConfig.model_validate(table)
        if "steps" in table:
            spec = qat.make_worker_spec(CompressionRun.open(config, inputs, out, context, run))
            qat.training.write_spec(spec)
            assert worker.main([str(spec.scratch / "worker_spec.json")]) == 0
        run(config, inputs, out, context)
        return artifact.publish(
            out, out.with_name("child"), stage="compress", node="c", identity={}, parents={}, summary={}
        )

    parent = parents("decoder")
    table = {"method": "optin", "heads": 0.5, "neurons": 0.25, "trials": 1}
    pruned = follow(table, {"prepare": prepared, "model": parent})
    inputs = {"prepare": prepared, "model": pruned, "teacher": parent}
    distilled = follow({"method": "distill", "features": 1.0, **PLAIN, **TINY}, inputs)
    quantized = follow({"method": "paretoq", "bits": 3, **PLAIN, **TINY}, {"prepare": prepared, "model": distilled})
    coded = follow({"method": "kvquant", "bits": 3, "samples": 8}, {"prepare": prepared, "model": quantized})
    configs = [json.loads((a.path / "model" / "config.json").read_text()) for a in (parent, pruned, distilled)]
    assert [config["intermediate_size"] for config in configs] == [48, 36, 36]
    assert [(config["num_attention_heads"], config["head_dim"]) for config in configs] == [(2, 16), (1, 16), (1, 16)]
    before, final = load_model(quantized.path / "model"), load_model(coded.path / "model")
    assert final.config.intermediate_size == 36
    for (name, one), (_, other) in zip(before.named_parameters(), final.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert 0 < float((logits(final) - logits(before)).std()) < 0.5 * float(logits(before).std())
    prompt = torch.arange(4, 16).unsqueeze(0)
    made = final.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=2)
    assert made.shape == (1, 18)
    cache = final.new_cache()
    with torch.no_grad():
        last = final(made, past_key_values=cache).logits[0, 11:-1].argmax(-1)
    assert torch.equal(last, made[0, 12:]), "greedy tokens are those of one pass with the coded cache"
    assert cache.get_seq_length() == 18
    plain = before(made, use_cache=True).past_key_values
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert 0 < 3 * cache.stored_bytes < full
    facts = json.loads((distilled.path / "training.json").read_text())
    assert facts["steps"] == 4
    sizes = [
        sum(p.stat().st_size for p in (a.path / "model").glob("*.safetensors")) for a in (parent, pruned, quantized)
    ]
    assert sizes == sorted(sizes, reverse=True)
