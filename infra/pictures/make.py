"""Make the pictures and the tables of README and docs from a finished run of the demo, so that none goes stale.

    make pictures                                    from the newest demo run of `.ingot`
    .venv/bin/python infra/pictures/make.py --check  change nothing; exit code 3 where a page tells other numbers

The report is drawn anew from the run's artifacts by the code of this checkout. MLflow serves the database of the store,
Prefect that of the server which the run had (`--prefect`), if it had one. Needs Chromium (`apt-get install chromium`).
Times and speeds in the tables are not touched: they were measured on a quiet machine. `run.json` beside this file keeps
the numbers and the sha256 of each picture; tests/infra/pictures compares.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipelines import report
from pipelines.core.errors import ConfigError, IngotError, IntegrityError, TransientError
from pipelines.core.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flows.run_record import RunRecord, Runs
from infra.pictures import browser, tables

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
FACTS = HERE / "run.json"
_HIDDEN_SECTIONS = ("gate", "data", "throughput", "lineage", "environment", "configuration", "samples", "compression")
_WIDTH, _TALLEST = 1280, 4000
_START_S = 90.0


def main() -> int:
    """Make or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=CHECKOUT / ".ingot", help="store of the run")
    parser.add_argument("--run", help="id of the run; default: the newest finished one of the recipe demo")
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    parser.add_argument("--prefect", type=Path, default=home, help="PREFECT_HOME of the server that the run had")
    parser.add_argument("--check", action="store_true", help="only compare the pages with the run")
    asked = parser.parse_args()
    try:
        record = _run(Runs(asked.store), asked.run)
        facts = tables.facts_of(record, asked.store)
        if asked.check:
            if wrong := tables.differences(facts):
                raise IntegrityError("\n".join(wrong), hint="make pictures")
            return 0
        tables.write(facts)
        make_pictures(record, asked.store, asked.prefect)
        pictures = {path.name: _sha256(path) for path in sorted(HERE.glob("*.png")) if path.stem in _MADE}
        for name in pictures:
            print(f"infra/pictures/{name}: {(HERE / name).stat().st_size // 1000} kB")
        FACTS.write_text(json.dumps(facts | {"pictures": pictures}, indent=1) + "\n", encoding="utf-8")
    except IngotError as error:
        print(f"pictures: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_pictures(record: RunRecord, store: Path, prefect: Path) -> None:
    """Write every picture of `_MADE`; Prefect's stays as it is where the run had no server."""
    with tempfile.TemporaryDirectory() as folder, browser.page(Path(folder) / "profile") as page:
        scratch = Path(folder)
        page.open(_report_page(record, store, scratch), width=_WIDTH, height=_TALLEST, shows=record.id)
        page.photograph(HERE / "report.png")
        database = f"sqlite:///{shutil.copyfile(store / 'mlflow.db', scratch / 'mlflow.db')}"
        server = ["-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
        with _serving(server, "/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}) as url:
            _photograph_mlflow(page, url, record)
        if not (prefect / "prefect.db").is_file():
            print(f"infra/pictures/prefect.png is left: {prefect} has no database; run with a Prefect server")
            return
        shutil.copytree(prefect, scratch / "prefect")
        server = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
        with _serving(server, "/api/health", {"PREFECT_HOME": str(scratch / "prefect")}) as url:
            address = f"{url}/runs/flow-run/{_flow_run(url, record)}"
            page.open(address, width=_WIDTH, height=740, shows="Task Runs")
            page.photograph(HERE / "prefect.png")


def _photograph_mlflow(page: browser.Page, url: str, record: RunRecord) -> None:
    """Photograph the list of runs, the newest with its nodes and all with a few metrics, and the champion's page."""
    promoted = record.nodes["promote"].summary
    metrics = ("bits_per_byte/pretrain", f"bits_per_byte/{promoted['candidate']}", "train/validation_loss")
    runs = f"{url}/#/experiments/1/runs"
    page.open(runs, width=1400, height=640, shows=record.recipe)
    page.remember({"mlflow.assistant.panelOpen_v1": "false"})
    state = 'MLflowLocalStorage-1.1-ExperimentPage-["1"]-ReactComponentState'
    page.change_remembered(state, selectedColumns=[f"metrics.`{name}`" for name in metrics])
    page.open("about:blank", width=1400, height=640, shows="")
    page.open(runs, width=1400, height=640, shows=metrics[0])
    page.click("button[data-component-id*=runnamecellrenderer]")
    page.photograph(HERE / "mlflow.png")
    version = f"{url}/#/models/{promoted['model']}/versions/{promoted['version']}"
    page.open(version, width=_WIDTH, height=1150, shows="Description")
    page.photograph(HERE / "mlflow-model.png")


_MADE = ("report", "mlflow", "mlflow-model", "prefect")


def _run(runs: Runs, name: str | None) -> RunRecord:
    if name is not None:
        return runs.get(name)
    done = [run for run in runs.all() if run.recipe == "demo" and run.status == "done" and not run.overrides]
    if not done:
        raise ConfigError(f"{runs.root} has no finished run of the recipe demo", hint="make run")
    return done[-1]


def _report_page(record: RunRecord, store: Path, scratch: Path) -> str:
    """Draw the report anew, keep the sections that fit a picture, and return its address."""
    artifacts = {name: open_store(store).find(node.stage, node.fingerprint) for name, node in record.nodes.items()}
    page = scratch / "report.html"
    report.write(record.model_dump(), {name: found for name, found in artifacts.items() if found is not None}, page)
    hidden = ", ".join(f"#{name}" for name in _HIDDEN_SECTIONS)
    html = page.read_text(encoding="utf-8").replace("</head>", f"<style>{hidden} {{ display: none }}</style></head>")
    page.write_text(html, encoding="utf-8")
    return page.as_uri()


def _flow_run(url: str, record: RunRecord) -> str:
    """Return Prefect's id of the flow run that began last before the run's record did."""
    body = json.dumps({"sort": "EXPECTED_START_TIME_DESC", "limit": 50}).encode()
    request = urllib.request.Request(f"{url}/api/flow_runs/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = [
            run for run in json.load(answer) if run["start_time"] and run["start_time"][:19] <= record.started_at[:19]
        ]
    if not found:
        raise ConfigError("Prefect's database in the store has no flow run of this run")
    return str(found[0]["id"])


@contextlib.contextmanager
def _serving(command: list[str], health: str, variables: dict[str, str]) -> Iterator[str]:
    """Run a server on a free port for the length of the block, and yield its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | variables | {"PREFECT_UI_API_URL": f"{url}/api"}
    server = subprocess.Popen(
        [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(url + health):
            if server.poll() is not None or time.monotonic() > deadline:
                raise TransientError(f"`python {' '.join(command)}` does not answer")
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
