"""The source files that a stage's code consists of: its entry module and everything of ours that this can import.

Read from the syntax trees, without importing anything: import statements at any depth, import strings (`"module:name"`,
`"package.module"`), and whole packages whose members are found by file name (`pkgutil.iter_modules`, or a name put
together by an f-string). Native sources beside an included module count too. What is imported for type checkers alone
does not.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.core import program
from pipelines.core.artifact import write_text

TOPS = ("flows", "pipelines", "models")
_NATIVE = (".c", ".cc", ".cpp", ".cu", ".h")
_NAME = re.compile(rf"(?:{'|'.join(TOPS)})(?:\.\w+)+(?::\w+)?")
_PREFIX = re.compile(rf"((?:{'|'.join(TOPS)})(?:\.\w+)+)\.")
_FORMAT = 1


@functools.cache
def digest(entry: str, root: Path = program.ROOT) -> str:
    """Return the sha256 over names and bytes of all source files of `module:function`."""
    facts = _facts(root)
    sha = hashlib.sha256()
    for path in _closure(entry, facts):
        sha.update(f"{path.relative_to(root).as_posix()} {facts.of(path)['sha256']}\n".encode())
    facts.save()
    return sha.hexdigest()


def files(entry: str, root: Path = program.ROOT) -> list[Path]:
    """Return the source files of `module:function`, sorted."""
    return _closure(entry, _facts(root))


def _closure(entry: str, facts: _Facts) -> list[Path]:
    included, native, pending = set[Path](), set[Path](), [entry.partition(":")[0]]
    while pending:
        name = pending.pop()
        if name.endswith(".*"):
            folder = facts.root.joinpath(*name.split(".")[:-1])
            pending += [f"{name[:-1]}{path.stem}" for path in folder.glob("*.py")]
            continue
        parts = name.split(".")
        # Importing a module runs the `__init__` of every package above it.
        for end in range(1, len(parts) + 1):
            path = facts.file(".".join(parts[:end]))
            if path is not None and path not in included:
                included.add(path)
                native.update(facts.native(path.parent))
                pending += facts.of(path)["imports"]
    return sorted(included | native)


class _Facts:
    """Hash and imports of each file, kept beside Python's own compiled files while the file has the same stat."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._record = root / "pipelines" / "core" / "__pycache__" / "source_closure.json"
        self._known: dict[str, dict[str, Any]] = {}
        self._changed = False
        self._files: dict[str, Path | None] = {}
        self._read: dict[Path, dict[str, Any]] = {}
        self._native: dict[Path, list[Path]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(self._record.read_text(encoding="utf-8"))
            self._known = stored["files"] if stored["format"] == _FORMAT else {}

    def file(self, module: str) -> Path | None:
        """Return the file of a module of ours, or None."""
        if module not in self._files:
            path = self.root / module.replace(".", "/")
            candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
            self._files[module] = next((each for each in candidates if each.is_file()), None)
        return self._files[module]

    def native(self, folder: Path) -> list[Path]:
        """Return the native sources in a folder."""
        if folder not in self._native:
            self._native[folder] = [each for each in folder.iterdir() if each.suffix in _NATIVE]
        return self._native[folder]

    def of(self, path: Path) -> dict[str, Any]:
        """Return sha256 and imports of a file."""
        if path in self._read:
            return self._read[path]
        status = path.stat()
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(str(path))
        if known is None or known["stamp"] != stamp:
            source = path.read_bytes()
            imports = sorted(set(_imports(ast.parse(source)))) if path.suffix == ".py" else []
            known = {"stamp": stamp, "sha256": hashlib.sha256(source).hexdigest(), "imports": imports}
            self._known[str(path)] = known
            self._changed = True
        self._read[path] = known
        return known

    def save(self) -> None:
        """Keep what was read, where that is possible."""
        if self._changed:
            with contextlib.suppress(OSError):
                self._record.parent.mkdir(exist_ok=True)
                write_text(self._record, json.dumps({"format": _FORMAT, "files": self._known}))
            self._changed = False


@functools.cache
def _facts(root: Path) -> _Facts:
    return _Facts(root)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of ours that a module can import, `package.*` for all members of a package."""
    imported, by_file_name = set[str](), False
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imported.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAME.fullmatch(node.value):
                imported.add(node.value.partition(":")[0])
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            if match := _PREFIX.fullmatch(str(node.values[0].value)):
                imported.add(f"{match[1]}.*")
        elif isinstance(node, ast.Attribute) and node.attr == "iter_modules":
            by_file_name = True
    ours = {name for name in imported if name.partition(".")[0] in TOPS}
    yield from ours
    if by_file_name:  # members of the packages that are imported here; a name that is no package has none
        yield from (f"{name}.*" for name in ours if "." in name)


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node below, without the blocks `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _run_time_nodes(other)
        else:
            yield child
            yield from _run_time_nodes(child)
