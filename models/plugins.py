"""Classes found by file name: a package whose modules each define one class of an agreed name.

Adding a member is adding a file. Listing imports nothing; only `load` imports the module that it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

_NOT_MEMBERS = {"base", "registry"}


def names(package: str) -> list[str]:
    """Return the names of the members of a package, sorted, without importing them."""
    paths = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(paths) if module.name not in _NOT_MEMBERS)


def load(package: str, name: str, class_name: str, what: str) -> type:
    """Return the class that a member defines.

    Args:
        package: dotted name.
        name: of the member.
        class_name: what its class is called, in every member.
        what: what a member is, for the error.

    Raises:
        ValueError: there is none of this name; the message has the known ones and the nearest.
    """
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no {what} {name!r}{meant} (known: {', '.join(known)})")
    member: type = getattr(importlib.import_module(f"{package}.{name}"), class_name)
    return member
