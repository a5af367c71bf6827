"""The table of stages: each has its body and its sources, and describing them imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipelines.core.settings import Settings
from pipelines.core.stage import imported
from pipelines.stages import STAGES

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_stages_are_there_and_each_has_its_body_and_sources() -> None:
    assert list(STAGES) == ["prepare", "fetch", "pretrain", "compress", "evaluate", "promote"]
    for one in STAGES.values():
        module = CHECKOUT / (one.entry.split(":")[0].replace(".", "/") + ".py")
        assert f"def {one.entry.split(':')[1]}(" in module.read_text(encoding="utf-8")
        assert all((CHECKOUT / source).exists() for source in one.sources)
        assert issubclass(imported(one.settings), Settings)
        assert not one.preview or callable(imported(one.preview))


def test_describing_the_stages_imports_neither_torch_nor_mlflow() -> None:
    code = "import sys, pipelines.stages, pipelines.core.run_stage, pipelines.core.launcher; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not {"'torch'", "'mlflow'", "'prefect'", "'transformers'"} & set(done.stdout.strip("[]\n").split(", "))
