"""The program: the folder of the code that runs, a checkout or an installation. A user's own files lie in a project."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the packages: the checkout, or where pip put them."""


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in another Python process, from whichever folder.

    `-P` keeps that folder out of the module search: a project may well have a folder called `models`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment, with which another Python process finds the same code."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@functools.cache
def commit(root: Path = ROOT) -> str:
    """Return which code this is.

    That is the commit of a checkout, with `+dirty` when tracked files were modified, and else the installed version. A
    repository around an installation, such as that of a project with a virtual environment in it, says nothing of it.
    """
    if _git(root, "ls-files", "--error-unmatch", "--", ".") and (head := _git(root, "rev-parse", "HEAD")):
        return head + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    return f"ingot-{version()} (installed)"


def version() -> str:
    """Return the version of the program, `0+unknown` where it was neither installed nor is its metadata beside it."""
    try:
        return importlib.metadata.version("ingot")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def is_checkout(root: Path = ROOT) -> bool:
    """Tell whether the program is a source tree, with tests and tools, and not an installation."""
    return (root / "pyproject.toml").is_file()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
