"""Modules that load when they are used: method modules can be read without paying for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models.lazy import lazy_module

LAZY = """
import sys
from models.lazy import lazy_module
torch = lazy_module("torch")
print("torch.nn" in sys.modules)
print(torch.tensor([1, 2]).sum().item())
print("torch.nn" in sys.modules, sys.modules["torch"] is torch, lazy_module("torch") is torch)
"""


def test_a_module_is_loaded_at_its_first_use_and_is_the_one_that_import_gives() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False", "3", "True True True"], done.stderr


def test_a_module_that_is_there_already_is_returned_as_it_is() -> None:
    assert lazy_module("subprocess") is subprocess


def test_a_module_that_is_not_installed_is_refused_at_once() -> None:
    """Not at the first use, which may lie hours later."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'") as caught:
        lazy_module("no_such_module")
    assert caught.value.name == "no_such_module"
    assert "no_such_module" not in sys.modules


def test_every_method_module_is_described_without_torch() -> None:
    code = (
        "import sys\nfrom models.compression import registry\n"
        "rows = [registry.describe(name) for name in registry.names()]\n"
        "print(len(rows), 'torch.nn' in sys.modules, 'transformers.modeling_utils' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count, *loaded = done.stdout.split()
    assert int(count) > 20, done.stderr
    assert loaded == ["False", "False"]
