"""A promoted model in the hands of its users: MLflow loads it with neither our code nor pickle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.core import fingerprint
from pipelines.core.errors import IntegrityError
from pipelines.registry import evidence

LIMIT_S = 280.0
_USER = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ingot@champion")
raw = model.get_raw_model()
print("transformers:", type(raw.model).__name__, raw.tokenizer("the king")["input_ids"])
print("pyfunc:", model.predict(model.input_example)[0][:5])
print("signature:", model.metadata.signature is not None)
print("ours:", [m for m in sys.modules if m.startswith(("pipelines", "models", "flows"))])
"""


@pytest.mark.slow
def test_mlflow_loads_the_champion_without_our_code_and_without_pickle(world: Any, tmp_path: Path) -> None:
    world.promote(world.candidate(2.0))
    user = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    user["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    (tmp_path / "user.py").write_text(_USER)
    command = [sys.executable, str(tmp_path / "user.py"), f"sqlite:///{world.root}/mlflow.db"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=user, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers: LlamaForCausalLM" in done.stdout
    assert "pyfunc:" in done.stdout
    assert "signature: True" in done.stdout
    assert "ours: []" in done.stdout


def test_the_registered_folder_holds_no_pickle(world: Any) -> None:
    world.promote(world.candidate(2.0))
    files = [path for path in (world.root / "mlartifacts").rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert ".safetensors" in kinds
    assert kinds <= {"", ".json", ".yaml", ".txt", ".md", ".npy", ".safetensors", ".jinja"}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


def test_pickled_evidence_is_refused_and_not_run(world: Any, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    inputs = world.candidate(2.0)
    facts = evidence.read(inputs)["pretrain"]
    evidence.save(facts, tmp_path)
    names = (evidence.EVIDENCE_FILE, evidence.NATS_FILE, evidence.SIZES_FILE)
    array = np.array([Bomb(sentinel)], dtype=object)
    for write in (
        lambda path: np.save(path, array, allow_pickle=True),
        lambda path: path.write_bytes(pickle.dumps(Bomb(sentinel))),
    ):
        write(tmp_path / evidence.NATS_FILE)
        with pytest.raises(IntegrityError, match="damaged"):
            evidence.load(tmp_path, "1", evidence.digest(facts))
        forged = fingerprint.digest({name: fingerprint.hash_file(tmp_path / name) for name in names})
        with pytest.raises(IntegrityError, match="allow_pickle"):
            evidence.load(tmp_path, "1", forged)
    assert not sentinel.exists()


def test_mlflow_is_told_to_refuse_pickle(world: Any) -> None:
    world.promote(world.candidate(2.0))
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
