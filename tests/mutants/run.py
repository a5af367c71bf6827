"""Plants small deliberate bugs, one at a time, and names those that no test notices: `make mutants`.

    python tests/mutants/run.py [--jobs N] [WORD ...]      only mutants whose file, bug or source has one of the words

Each table of the `*.toml` files here is a mutant: `file`, the text `old` that stands in it once, the text `new` that
takes its place, what the `bug` is in words, and the `tests` that must notice it (those of the file where it has none).
A mutant is put into a copy of the tree, where its tests run in a process forked from one that has loaded the big
libraries. First the same tests run without any bug: a test that fails then would notice everything.

Exit code 1: a mutant survived, or a test fails by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_PRELOADED = ("numpy", "scipy.stats", "torch", "transformers.models.llama.modeling_llama", "safetensors.torch")
_LIMIT_S = 600
"""A bug may make a program wait for ever: that is noticed, too."""


@dataclass(frozen=True)
class Mutant:
    """A deliberate bug."""

    area: str
    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> str:
        """Put the bug into a copy of the tree; return the text of the file as it was.

        Raises:
            ValueError: the text to replace does not stand in the file exactly once.
        """
        path = tree / self.file
        before = path.read_text(encoding="utf-8")
        if (count := before.count(self.old)) != 1:
            raise ValueError(f"{self.area}.toml, {self.bug!r}: {self.old!r} stands {count} times in {self.file}")
        path.write_text(before.replace(self.old, self.new), encoding="utf-8")
        return before


def mutants() -> list[Mutant]:
    """Return all mutants, by area."""
    made = []
    for path in sorted(HERE.glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        made += [Mutant(path.stem, **{"tests": table["tests"], **each}) for each in table["mutant"]]
    return made


def _copy(target: Path) -> None:
    """Copy what git knows, or would add."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def _tests(tree: str, tests: Sequence[str], log: str) -> None:
    """Run tests in a copy of the tree; the body of a forked process, which ends with pytest's exit code."""
    import pytest

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree
    sys.dont_write_bytecode = True  # sources change within the second that a cached one is believed for
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.path[:] = [tree, *(path for path in sys.path if not (Path(path) / "flows" / "__init__.py").is_file())]
    options = [
        "-x",
        "-q",
        "--no-header",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tree}.tmp",
        "--timeout=120",
    ]
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(code))  # threads of a library that a bug has left hanging are not waited for


def _run(tree: Path, tests: Sequence[str], limit_s: float | None) -> tuple[int, str]:
    """Return the exit code of tests in a copy of the tree (minus the signal that killed them), and their output."""
    context = multiprocessing.get_context("forkserver")
    log = Path(f"{tree}.log")
    process = context.Process(target=_tests, args=(str(tree), list(tests), str(log)))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def main(arguments: list[str]) -> int:
    """Run the mutants; return the exit code."""
    parser = argparse.ArgumentParser(description="Plant deliberate bugs and name those that no test notices.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("words", nargs="*", help="only mutants whose area, bug or file has one of these words")
    asked = parser.parse_args(arguments)
    chosen = [
        each
        for each in mutants()
        if not asked.words or any(word in f"{each.area}.toml {each.bug} {each.file}" for word in asked.words)
    ]
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_PRELOADED))
    started, survivors = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(asked.jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(asked.jobs):
            _copy(Path(folder) / str(number))
            trees.put(Path(folder) / str(number))

        def judge(mutant: Mutant | None, tests: Sequence[str]) -> str:
            """Return what is to be said of it; nothing where a test failed, or, without a mutant, none did."""
            tree = trees.get()
            try:
                before = mutant.apply(tree) if mutant else ""
                code, output = _run(tree, tests, _LIMIT_S if mutant else None)
                if mutant:
                    (tree / mutant.file).write_text(before, encoding="utf-8")
            finally:
                trees.put(tree)
            if mutant is None:
                return f"these tests fail without any bug:\n{output}" if code else ""
            if code in {0, 5} or code == 4:  # passed; none found; the tests named are not there
                why = "its tests are not there" if code else "survives"
                return f"{why}: {mutant.bug} ({mutant.file}; {mutant.area}.toml)"
            return "" if code > 0 else f"noticed by its time: {mutant.area}: {mutant.bug}"

        names = sorted({test for each in chosen for test in each.tests})
        parts = [part for number in range(asked.jobs) if (part := names[number :: asked.jobs])]
        sound = [problem for problem in pool.map(lambda tests: judge(None, tests), parts) if problem]
        if sound:
            print("\n".join(sound))
            return 1
        print(f"{len(names)} selections of tests pass without a bug after {time.monotonic() - started:.0f} s")
        for mutant, problem in zip(chosen, pool.map(lambda each: judge(each, each.tests), chosen), strict=True):
            print(problem or f"noticed: {mutant.area}: {mutant.bug}", flush=True)
            if problem and not problem.startswith("noticed"):
                survivors.append(problem)
    print(f"{len(chosen)} planted, {len(survivors)} not noticed, {time.monotonic() - started:.0f} s")
    print("\n".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
