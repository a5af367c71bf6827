"""What the pages for readers say, taken apart: code blocks, commands, links, paths, keys."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [CHECKOUT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")] + list((CHECKOUT / "docs").rglob("*.md"))
)
NAMES = [page.relative_to(CHECKOUT).as_posix() for page in PAGES]
PLACEHOLDER = re.compile(r"(?<![A-Za-z0-9-])[A-Z][A-Z_]+(?![\w=])|\.\.\.")
"""NAME, RUN, DIAGNOSTICS: what a reader puts something of his own in place of."""

_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One page."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Path from the checkout."""
        return self.path.relative_to(CHECKOUT).as_posix()

    def blocks(self, *languages: str) -> list[str]:
        """Return the code blocks in one of these languages ("" is a block without one)."""
        return [body for language, body in _BLOCK.findall(self.text) if language in languages]

    def lines(self) -> list[str]:
        """Return the lines of all shell blocks, without comments."""
        lines = (line.split("  #")[0].strip() for block in self.blocks("", "sh") for line in block.splitlines())
        return [line for line in lines if line]

    def spans(self) -> list[str]:
        """Return what stands in backticks in the running text."""
        return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", self.text))

    def commands(self) -> list[list[str]]:
        """Return the arguments of every `ingot ...` in blocks and in backticks."""
        shown = [line for line in self.lines() if re.match(r"\.venv/bin/ingot |\$ ingot ", line)]
        shown += [span for span in self.spans() if re.match(r"(\.venv/bin/)?ingot [a-z]", span)]
        return [shlex.split(line.removeprefix("$ "))[1:] for line in shown]

    def verbs(self) -> list[str]:
        """Return the verbs of listings such as `ingot plan      what a run would do`."""
        return [line.split()[1] for line in self.lines() if re.match(r"ingot [a-z]+ {2,}", line)]

    def targets(self) -> set[str]:
        """Return the make targets that are named."""
        spans = (re.fullmatch(r"make ([a-z-]+)", span) for span in self.spans())
        return {found[1] for found in spans if found} | {
            line.split()[1] for line in self.lines() if line.startswith("make ")
        }

    def links(self) -> list[str]:
        """Return the targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", self.text)

    def anchors(self) -> set[str]:
        """Return what a link to this page may have behind a `#`."""
        heads = re.findall(r"^#+ (.+)$", _BLOCK.sub("", self.text), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}

    def paths(self) -> list[str]:
        """Return the files and folders of the checkout that are named in backticks."""
        start = r"(?:flows|pipelines|models|infra|tests|docs)/[\w./*-]*"
        found = [re.fullmatch(start, span) for span in self.spans()]
        return [path[0] for path in found if path and not PLACEHOLDER.search(path[0])]

    def modules(self) -> list[str]:
        """Return the dotted names of our code."""
        found = re.findall(r"(?<![\w./])((?:flows|pipelines|models)(?:\.\w+)+)", self.text)
        return [name for name in found if not PLACEHOLDER.search(name) and not name.endswith((".py", ".toml"))]


def read(name: str) -> Page:
    """Return the page of this name."""
    path = CHECKOUT / name
    return Page(path, path.read_text(encoding="utf-8"))
