"""Finds compression methods: a module of this package that defines a class `Method` is one, under its own file name.

Nothing here imports torch; method modules reach it through `models.lazy`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from typing import Any, TypeVar

import models.compression
from models.compression.base import CompressionMethod, Kind, PackingMethod, WeightMethod
from models.compression.cache_method import CacheMethod
from models.compression.structure_method import StructureMethod
from models.compression.training_method import TrainingMethod

M = TypeVar("M", bound=CompressionMethod[Any])


def names(kind: Kind | None = None) -> list[str]:
    """Return the names of all methods, or of those of one kind, sorted."""
    return [name for name, method in _methods().items() if kind in (None, method.kind)]


def get(name: str) -> CompressionMethod[Any]:
    """Return the method of this name.

    Raises:
        ValueError: no method has this name; the message lists the known ones and the nearest.
    """
    # A plan reads the settings of the few methods of a recipe; importing all of them takes longer than the plan.
    method = _method(name) if name in _modules() else None
    return method or _known(name, _methods(), "compression method")


def weight(name: str) -> WeightMethod[Any]:
    """Return a method that compresses weight matrices.

    Raises:
        ValueError: no method of this kind has the name; so for the other kinds below.
    """
    methods = {n: m for n, m in _methods().items() if isinstance(m, WeightMethod)}
    return _known(name, methods, "compression method of kind 'weight'")


def packing(name: str) -> PackingMethod[Any]:
    """Return a method that stores layers packed, whether it trains or not."""
    methods = {n: m for n, m in _methods().items() if isinstance(m, PackingMethod)}
    return _known(name, methods, "compression method that packs layers")


def training(name: str) -> TrainingMethod[Any]:
    """Return a method that trains a compressed model."""
    methods = {n: m for n, m in _methods().items() if isinstance(m, TrainingMethod)}
    return _known(name, methods, "compression method of kind 'training'")


def structure(name: str) -> StructureMethod[Any]:
    """Return a method that cuts heads and neurons."""
    methods = {n: m for n, m in _methods().items() if isinstance(m, StructureMethod)}
    return _known(name, methods, "compression method of kind 'structure'")


def kv_cache(name: str) -> CacheMethod[Any]:
    """Return a method that quantizes the attention cache."""
    methods = {n: m for n, m in _methods().items() if isinstance(m, CacheMethod)}
    return _known(name, methods, "compression method of kind 'kv_cache'")


def describe(name: str) -> dict[str, str]:
    """Return what tables say of a method: name, kind, bits, calibration, paper."""
    method = get(name)
    said = {"kind": method.kind, "bits": method.bits, "calibration": method.calibration, "paper": method.paper}
    return {"name": name} | {key: str(value) for key, value in said.items()}


def _known(name: str, methods: dict[str, M], what: str) -> M:
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no {what} {name!r}{meant} (known: {', '.join(methods)})")
    return methods[name]


@functools.cache
def _methods() -> dict[str, CompressionMethod[Any]]:
    """Return an instance of every method."""
    methods = {name: _method(name) for name in _modules()}
    return {name: method for name, method in methods.items() if method is not None}


@functools.cache
def _modules() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(models.compression.__path__)))


@functools.cache
def _method(name: str) -> CompressionMethod[Any] | None:
    """Return the method of a module, None for a module that has none; breaking the contract of one is not silent."""
    method = vars(importlib.import_module(f"models.compression.{name}")).get("Method")
    if method is None:
        return None
    if not (isinstance(method, type) and issubclass(method, CompressionMethod)):
        raise TypeError(f"models.compression.{name}: `Method` must extend the class of its kind")
    return method()
