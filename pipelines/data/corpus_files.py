"""Which files a corpus consists of: those that DVC records, no more and no fewer, and which of them are to be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pathspec

from pipelines.core.errors import IntegrityError

IGNORE_FILE = ".dvcignore"
_NEVER = (".hg/", ".git/", ".git", ".dvc/")
"""What DVC leaves out always."""
_NAMED = 5


def files(path: Path, project: Path | None = None) -> list[Path]:
    """Return the files of a corpus in the order of their paths, without those that DVC ignores.

    Args:
        path: a folder, or one file.
        project: the folder with `.dvc`, from which on `.dvcignore` files count; None where none do.

    Raises:
        IntegrityError: a folder or a file is a link that DVC does not follow: what it leads to would be left out; or
            there is an ignore file, which DVC wants above.
    """
    if path.is_file():
        return [path]
    found: list[Path] = []
    links: list[Path] = []
    for folder, names, members in _walk(path, project):
        links += [folder / name for name in names if (folder / name).is_symlink()]
        for name in members:
            (found if (folder / name).is_file() else links).append(folder / name)
    if links:
        _refuse_links(sorted(links))
    if project is not None and (own := [one for one in found if one.name == IGNORE_FILE]):
        raise IntegrityError(
            f"{own[0]}: DVC records no folder with an ignore file in it",
            hint=f"move its lines to {project / IGNORE_FILE}",
        )
    return sorted(found)


def selected(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that patterns as in .gitignore choose, in their order; the last pattern that matches decides."""
    spec = pathspec.PathSpec.from_lines("gitignore", patterns)
    return [name for name in names if spec.match_file(name)]


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first of the patterns that matches a name."""
    return next((one for one in patterns if pathspec.PathSpec.from_lines("gitignore", [one]).match_file(name)), None)


def _walk(path: Path, project: Path | None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk as DVC does: ignored folders are not entered, links to folders are not followed."""
    specs: list[_Spec] = []
    if project is not None:
        specs.append(_Spec(project, _NEVER))
        above = [project, *reversed([p for p in path.parents if p.is_relative_to(project) and p != project])]
        specs += [spec for folder in above if (spec := _Spec.of(folder))]
    for root, names, members in os.walk(path):
        folder = Path(root)
        kept = [name for name in sorted(names) if not _ignored(specs, folder / name, "/")]
        names[:] = kept
        yield folder, kept, [name for name in members if not _ignored(specs, folder / name, "")]


def _ignored(specs: Sequence[_Spec], path: Path, end: str) -> bool:
    for spec in reversed(specs):
        if (decided := spec.decides(path, end)) is not None:
            return decided
    return False


class _Spec:
    """The patterns of one ignore file, which count in its folder and below."""

    def __init__(self, folder: Path, lines: Iterable[str]) -> None:
        self._folder = folder
        self._spec = pathspec.PathSpec.from_lines("gitignore", [line.strip() for line in lines])

    @classmethod
    def of(cls, folder: Path) -> _Spec | None:
        file = folder / IGNORE_FILE
        return cls(folder, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else None

    def decides(self, path: Path, end: str) -> bool | None:
        """Return whether the patterns ignore a path, or None if none of them speaks of it."""
        if not path.is_relative_to(self._folder):
            return None
        return self._spec.check_file(path.relative_to(self._folder).as_posix() + end).include


def _refuse_links(links: list[Path]) -> None:
    more = f" and {len(links) - _NAMED} more" if len(links) > _NAMED else ""
    folders = any(link.is_dir() for link in links)
    what = "links to folders, which DVC does not follow" if folders else "links to nothing"
    raise IntegrityError(
        f"{', '.join(map(str, links[:_NAMED]))}{more}: {what}; the corpus would be without what they stand for",
        hint=f"put the files in their place (`cp -rL`), remove the links, or list them in {IGNORE_FILE}",
    )
