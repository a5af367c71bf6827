"""torchao folders: loaded by transformers and torchao in a process without our code, logits compared with ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.compression import rtn
from models.compression.base import Statistics
from pipelines.core.artifact import Artifact
from pipelines.deploy import torchao
from pipelines.deploy.torchao import Precision

TOKENS = [0, 17, 42, 5, 99, 120, 7, 8, 200, 31, 11, 64]
READER = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    auto = AutoModelForMaskedLM if "encoder" in name else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    kinds = {type(p.data).__name__ for p in model.parameters()} | {type(p).__name__ for p in model.parameters()}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
    numpy.save(f"{folder}/logits.npy", logits.float().numpy())
    open(f"{folder}/kinds", "w").write(" ".join(sorted(kinds)))
assert not {"pipelines", "flows"} & {m.split(".")[0] for m in sys.modules}
"""
CHILDREN: dict[str, tuple[dict[str, Any], Precision]] = {
    "rows8": ({"bits": 8, "group_size": 0}, "int8"),
    "rows6": ({"bits": 6, "group_size": 0}, "int8"),
    "groups4": ({"bits": 4, "group_size": 32}, "int8"),
    "zeros3": ({"bits": 3, "group_size": 16, "symmetric": False}, "int8"),
    "inputs-kept": ({"bits": 8, "group_size": 0, "activations": "int8"}, "int8-dynamic"),
    "inputs-lost": ({"bits": 8, "group_size": 0, "activations": "int8"}, "int8"),
}
"""Name -> parameters of `rtn`, and the precision of the export."""
PARENTS: list[tuple[str, Precision]] = [(f, p) for f in ("decoder", "encoder") for p in ("int8", "int4")]
MakeModel = MakeVariant = Callable[..., Artifact]


@dataclass(frozen=True)
class Export:
    """One torchao folder: where it comes from, and what transformers and torchao made of it alone."""

    source: Path
    folder: Path
    used: dict[str, int]

    @property
    def logits(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.load(self.folder / "logits.npy")
        return found

    @property
    def kinds(self) -> set[str]:
        """Types of its parameters."""
        return set((self.folder / "kinds").read_text().split())


@pytest.fixture(scope="module")
def exports(
    model_artifact: MakeModel, variant: MakeVariant, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Export]:
    """Every case, read by one process without a module of ours: starting it takes longer than all the rest."""
    root = tmp_path_factory.mktemp("torchao")
    parents = {family: model_artifact(family=family) for family in ("decoder", "encoder")}
    made: dict[str, Export] = {}

    def add(name: str, source: Path, precision: Precision) -> None:
        (root / name).mkdir()
        made[name] = Export(source, root / name, torchao.write(source, root / name, precision))

    for name, (table, precision) in CHILDREN.items():
        artifact = variant(parents["decoder"], root / f"variant-{name}", {"method": "rtn"} | table)
        add(name, artifact.path / "model", precision)
    for family, precision in PARENTS:
        add(f"{family}-{precision}", parents[family].path / "model", precision)
    code = READER.replace("TOKENS", repr(TOKENS))
    done = subprocess.run([sys.executable, "-c", code, str(root), *made], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Root mean square of the difference over the deviation of the second."""
    return float(np.sqrt(np.mean((one - other) ** 2)) / other.std())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rows8", "Int8Tensor"), ("rows6", "Int8Tensor")]
    + [(name, "IntxUnpackedToInt8Tensor") for name in ("groups4", "zeros3")],
)
def test_the_integers_of_a_variant_are_taken_over(
    name: str, kind: str, exports: dict[str, Export], model_artifact: MakeModel, transformers_logits: Any
) -> None:
    """The logits are those of our loader to float accuracy, whose distance from the parent's is far greater."""
    made = exports[name]
    assert made.used == {"taken over": 14, "rounded": 0}
    assert kind in made.kinds
    ours = transformers_logits(made.source, TOKENS)
    assert distance(made.logits, ours) < 1e-5
    assert distance(ours, transformers_logits(model_artifact().path / "model", TOKENS)) > 1e-3, "rounding shows"


@pytest.mark.parametrize(("precision", "low", "high"), [("int8", 1e-4, 0.03), ("int4", 0.03, 0.5)])
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_float_model_of_either_family_is_rounded(
    precision: str, low: float, high: float, family: str, exports: dict[str, Export], transformers_logits: Any
) -> None:
    made = exports[f"{family}-{precision}"]
    assert made.used["taken over"] == 0
    assert made.used["rounded"] >= 8
    assert low < distance(made.logits, transformers_logits(made.source, TOKENS)) < high
    before, after = ((path / "model.safetensors").stat().st_size for path in (made.source, made.folder))
    assert after < 0.6 * before


def test_rounded_inputs_are_those_of_the_variant(exports: dict[str, Export], transformers_logits: Any) -> None:
    """In a whole model only nearer to the variant than the same weights with inputs as they are: 0.010 against 0.025.

    A sum in another order moves an input over the edge of a code now and then, and the next layers amplify that.
    """
    kept, lost = exports["inputs-kept"], exports["inputs-lost"]
    ours = transformers_logits(kept.source, TOKENS)
    assert distance(kept.logits, ours) < 0.6 * distance(lost.logits, ours)


def test_a_layer_with_rounded_inputs_multiplies_as_the_variants_layer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 64, generator=generator), torch.randn(2, 12, 64, generator=generator)
    packed = rtn.Method().compress(weight, Statistics(), rtn.Config(bits=8, group_size=0, activations="int8"))
    codes = torchao.integers(packed)
    assert codes is not None
    assert torchao.rounds_same_inputs(packed, "int8-dynamic")
    assert not torchao.rounds_same_inputs(packed, "int8")
    found = torch.nn.functional.linear(x, torchao.taken(codes, dynamic=True))
    assert torch.allclose(found, packed.forward(x), atol=1e-4)
    assert not torch.allclose(found, torch.nn.functional.linear(x, packed.dequantize()), atol=1e-2)


def test_codes_scales_and_what_is_left_alone_are_in_the_file(model_artifact: MakeModel, tmp_path: Path) -> None:
    parent = model_artifact()
    torchao.write(parent.path / "model", tmp_path, "int8")
    held, original = load_file(tmp_path / "model.safetensors"), load_file(parent.path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    packed = rtn.Method().compress(original[f"{name}.weight"], Statistics(), rtn.Config(bits=8, group_size=0))
    codes = torchao.integers(packed)
    assert codes is not None
    assert torch.equal(held[f"{name}._weight_qdata"], codes.codes_OI)
    assert torch.equal(held[f"{name}._weight_scale"], codes.grid.scale_OG)
    assert torch.equal(held["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, 0, True), (5, 8, True), (2, 16, False), (4, 0, False)])
def test_a_tensor_stands_for_what_its_codes_do(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    config = rtn.Config(bits=bits, group_size=group, symmetric=symmetric)
    packed = torchao.integers(rtn.Method().compress(weight, Statistics(), config))
    assert packed is not None
    tensor: Any = torchao.taken(packed, dynamic=False)
    assert torch.equal(tensor.dequantize(), packed.dequantize())
