"""Finds compression methods: a module of this package that defines `kind` is one, under its own file name.

One with a `Config` but no `kind` is found by name and not listed: it makes children with the methods (`search`).

Nothing here imports torch; method modules reach it through `models.lazy`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from types import ModuleType

import models.compression


def names(kind: str | None = None) -> list[str]:
    """Return the names of all methods, or of those of one kind, sorted."""
    return [n for n, m in _modules().items() if hasattr(m, "kind") and kind in (None, m.kind)]


def get(name: str) -> ModuleType:
    """Return the module of a method; see `models.compression.base` for what it holds.

    Raises:
        ValueError: no method has this name; the message lists the known ones and the nearest.
    """
    methods = _modules()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no compression method {name!r}{meant} (known: {', '.join(methods)})")
    return methods[name]


def describe(name: str) -> dict[str, str]:
    """Return what tables say of a method: name, kind, bits, calibration, paper."""
    module = get(name)
    return {"name": name} | {key: str(getattr(module, key)) for key in ("kind", "bits", "calibration", "paper")}


@functools.cache
def _modules() -> dict[str, ModuleType]:
    found = sorted(module.name for module in pkgutil.iter_modules(models.compression.__path__))
    modules = {name: importlib.import_module(f"models.compression.{name}") for name in found if name != "registry"}
    return {name: module for name, module in modules.items() if hasattr(module, "Config")}
