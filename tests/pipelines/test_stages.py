"""The table of stages: each has its body, and describing them imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.compression import registry
from pipelines.core import source_closure
from pipelines.core.settings import Settings
from pipelines.core.stage import imported
from pipelines.stages import STAGES

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_stages_are_there_and_each_has_its_body() -> None:
    assert list(STAGES) == ["prepare", "fetch", "pretrain", "compress", "evaluate", "promote"]
    for one in STAGES.values():
        module = CHECKOUT / (one.entry.split(":")[0].replace(".", "/") + ".py")
        assert f"def {one.entry.split(':')[1]}(" in module.read_text(encoding="utf-8")
        assert issubclass(imported(one.settings), Settings)
        assert not one.preview or callable(imported(one.preview))


def test_describing_the_stages_imports_neither_torch_nor_mlflow() -> None:
    code = "import sys, pipelines.stages, pipelines.core.run_stage, pipelines.core.launcher; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not {"'torch'", "'mlflow'", "'prefect'", "'transformers'"} & set(done.stdout.strip("[]\n").split(", "))


CODE = """
import importlib, pkgutil, sys
importlib.import_module(sys.argv[1])
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("flows", "pipelines", "models") and module.__file__:
        print(module.__file__)
"""


@pytest.mark.parametrize("name", list(STAGES))
def test_whatever_the_import_of_a_body_loads_is_a_source_of_the_stage(name: str) -> None:
    module = STAGES[name].entry.partition(":")[0]
    done = subprocess.run(
        [sys.executable, "-c", CODE, module], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    loaded = {Path(line) for line in done.stdout.splitlines() if line.startswith(str(CHECKOUT))}
    assert len(loaded) > 5
    assert loaded <= set(source_closure.files(STAGES[name].entry))


def test_what_is_found_by_file_name_or_named_in_a_string_is_a_source_too() -> None:
    """Methods, drivers and the worker are imported when they are needed, and the kernels are compiled then."""
    sources = {
        name: {path.relative_to(CHECKOUT).as_posix() for path in source_closure.files(STAGES[name].entry)}
        for name in ("prepare", "pretrain", "compress", "evaluate")
    }
    optimizers = {"models/optim/native.cpp", "models/optim/lamb.py"}
    assert optimizers | {"pipelines/training/worker.py", "models/architectures/decoder.py"} <= sources["pretrain"]
    assert {f"models/compression/{name}.py" for name in registry.names()} <= sources["compress"]
    assert optimizers | {"pipelines/compression/kv_cache.py"} <= sources["compress"]
    assert not any(path.startswith("pipelines/training") for path in sources["prepare"])
    assert {path for path in sources["prepare"] if path.startswith("models/")} <= {
        "models/__init__.py", "models/closed.py", "models/plugins.py",
    }  # fmt: skip
    assert not any(path.startswith("flows/") for paths in sources.values() for path in paths)
