"""--version: what runs here, for a report of a fault. Reads the metadata of packages and imports none of them."""

from __future__ import annotations

import platform
from importlib import metadata

from pipelines.core import program

_STANDS_ON = ("torch", "deepspeed", "transformers", "prefect", "mlflow", "dvc")


def show() -> None:
    """Print one line for Ingot and one for what it stands on."""
    print(f"ingot {program.version()} ({program.commit()})")
    parts = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in _STANDS_ON)]
    print(", ".join(parts))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
