"""What a command says of itself and of errors that nobody foresaw: version, log, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
Ingot = Callable[..., subprocess.CompletedProcess[str]]


def test_version_names_what_it_stands_on(ingot: Ingot) -> None:
    said = ingot("--version").stdout
    assert said.startswith("ingot ")
    for part in ("python 3.", "torch 2.", "deepspeed 0."):
        assert part in said


def test_an_unforeseen_error_names_its_log_and_verbose_shows_the_traceback(
    empty_store: Path, environment_of: Callable[[Path], dict[str, str]]
) -> None:
    code = (
        "import sys, warnings\nfrom flows import recipe\nfrom flows.cli import main\n"
        "def broken(*_):\n    warnings.warn('of a library, with c4n4ry-Zq81')\n"
        "    raise RuntimeError('nobody foresaw this: http://u:c4n4ry@host')\n"
        "recipe.names = broken\nmain()"
    )
    command = [sys.executable, "-c", code, "list", "recipes"]
    secret = environment_of(empty_store) | {"SERVICE_PASSWORD": "c4n4ry-Zq81"}
    for verbose in (False, True):
        done = subprocess.run(
            [*command, *["-v"][: int(verbose)]],
            cwd=CHECKOUT, env=secret, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        assert "c4n4ry" not in done.stderr
        assert "RuntimeError: nobody foresaw this" in done.stderr
        assert ("Traceback" in done.stderr, "of a library" in done.stderr) == (verbose, verbose)
    log = min((empty_store / "logs").glob("*.log"))
    assert "Traceback" in log.read_text()
    assert "of a library, with ***" in log.read_text()
    assert "c4n4ry" not in log.read_text()


def test_the_shell_completes_settings_recipes_and_stages(
    empty_store: Path, environment_of: Callable[[Path], dict[str, str]]
) -> None:
    code = "import sys\nsys.argv = ['ingot']\nfrom flows.__main__ import main\nmain()"
    for typed, wanted in (
        ("ingot run pretrain.optimizer.na", "pretrain.optimizer.name="),
        ("ingot plan --recipe smo", "smoke"),
        ("ingot run --only eva", "evaluate"),
        ("ingot list mo", "models"),
    ):
        asked = {"_INGOT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=CHECKOUT, env=environment_of(empty_store) | asked, capture_output=True, text=True,
        )  # fmt: skip
        assert wanted in done.stdout.split(), (typed, done.stdout, done.stderr)


def test_the_module_is_the_command(empty_store: Path, environment_of: Callable[[Path], dict[str, str]]) -> None:
    environment = environment_of(empty_store) | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT)])}
    for module in ("flows", "flows.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "list", "recipes", "-q"], cwd=CHECKOUT, env=environment, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_foreseen_error_of_a_library_keeps_its_traceback_in_the_log(
    empty_store: Path, environment_of: Callable[[Path], dict[str, str]]
) -> None:
    code = (
        "from pathlib import Path\nfrom flows import recipe\nfrom flows.cli import main\n"
        "recipe.names = lambda *_: Path('/no/such/file').read_text()\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "recipes"],
        cwd=CHECKOUT, env=environment_of(empty_store), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "ingot: /no/such/file: no such file or directory\n  -> " in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in min((empty_store / "logs").glob("*.log")).read_text()
