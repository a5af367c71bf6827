"""Methods that train, on a tiny corpus: any engine, any optimizer, killed and resumed, stored and loaded again."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from models.architectures.build import build
from models.compression import registry
from pipelines import artifact
from pipelines.artifact import Artifact
from pipelines.compression import training
from pipelines.compression.config import CompressConfig
from pipelines.compression.load import load_model
from pipelines.compression.stage import run
from pipelines.errors import Preempted
from pipelines.stage import StageContext
from pipelines.training import program, worker
from pipelines.training.config import PretrainConfig

PLAIN = {"engine": "plain", "world_size": 1, "zero_stage": 0, "micro_batch_size": 4, "controls": False}
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
    "bitnet-wide": {"method": "bitnet", "start": "scratch", "widen": 2},
    "maestro": {"method": "maestro", "value_bits": 32, "penalty": 1e-3},
    "maestro-all": {"method": "maestro", "value_bits": 32, "drawn": "all", "allocation": "uniform"},
    "maestro-svd": {"method": "maestro", "value_bits": 32, "cut": "start"},
    "sortednet": {"method": "sortednet", "depth": 2},
    "distill": {"method": "distill", "layers": 2, "features": 1.0},
    "finetune": {"method": "finetune"},
}


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

    def go(table: dict[str, Any], *, name: str = "child", family: str = "decoder", here: bool = True) -> Child:
        place = tmp_path / name
        (place / "out").mkdir(parents=True, exist_ok=True)
        context = StageContext("compress.x", place / "scratch", compute={"device": "cpu", "threads": 1})
        config = CompressConfig.model_validate({**PLAIN, **TINY, **table} if here else {**TINY, **table})
        inputs = {"prepare": prepared, "model": parents(family)}
        if here and config.parameters.steps:  # type: ignore[attr-defined]
            job = training.make_job(config, inputs, context)
            training.training._order(job)
            code = worker.main([str(job.work / "job.json")])
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
    from pipelines.training.job import Job

    job = Job.model_validate_json((place / "scratch" / "train" / "job.json").read_text())
    assert job.program is not None
    model = program.student(job.program, job.config.architecture(job.index), job.config.seed)
    program.restore(model, job.model)
    return model.eval()


@pytest.mark.parametrize("name", [name for name in TABLES if not name.startswith(("bitnet", "maestro"))])
def test_the_stored_child_computes_exactly_what_was_trained(name: str, family: str, make: Make, tmp_path: Path) -> None:
    """Bit for bit, for what is deployed as it was trained; cut children are compared with a cut of the student."""
    child = make(TABLES[name], family=family)
    student = trained_student(TABLES[name], tmp_path / "child")
    method = registry.get(TABLES[name]["method"])
    config = CompressConfig.model_validate({**PLAIN, **TINY, **TABLES[name]}).parameters
    if method.__name__.endswith(("sortednet", "maestro")):
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
