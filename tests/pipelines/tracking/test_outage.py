"""MLflow away: training is not delayed, nothing fails, and what was missed is sent later. Real sockets and server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.artifact import Artifact
from pipelines.core.errors import TransientError
from pipelines.core.stage import Progress
from pipelines.tracking.client import connect, reachable
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.session import open_session
from pipelines.tracking.sync import sync
from tests.pipelines.tracking.slow_proxy import SlowProxy

ADDED_LIMIT_S = 0.1
START_LIMIT_S = 300.0
"""On a machine that is busy with other work; alone it takes some seconds."""
REQUESTS_OF_ONE_STAGE = 14
"""Experiment (2), run (2), stage (2), curves and tags, overview, files (2), two ends, and two to spare."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a silent server after a second."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_reports_cost_nothing_while_mlflow_is_away(
    store_root: Path, silent_server: str, short_requests: None, rows: list[dict[str, Any]], kind: str
) -> None:
    uri = silent_server if kind == "silent" else f"http://127.0.0.1:{free_port()}"
    config = TrackingConfig(uri=uri, timeout_s=1, finish_s=0.5)
    session = open_session(config, store_root, run_id="r1", recipe="smoke", params={}, data_hash=None)
    with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        started = time.monotonic()
        for row in rows * 50:
            stage.report(Progress("pretrain", row["step"], 20, "steps", metrics={"loss": row["loss"]}))
        assert time.monotonic() - started < ADDED_LIMIT_S
    started = time.monotonic()
    session.close("done")
    assert time.monotonic() - started < config.finish_s + 5.0
    assert session.pending


def test_what_was_missed_is_sent_when_mlflow_comes_back(
    store_root: Path,
    short_requests: None,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
    expected: Callable[..., Any],
) -> None:
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", timeout_s=1, finish_s=5)
    session = open_session(away, store_root, run_id="r1", recipe="smoke", params={"a": 1}, data_hash=None)
    with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        stage.finish(publish(rows, summary={"family": "decoder"}), cached=False)
    session.close("done")
    assert [(r.synced, "tracking pending" in r.message) for r in sync(away, store_root)] == [(False, True)]
    assert [r.synced for r in sync(TrackingConfig(), store_root)] == [True]
    client = connect(TrackingConfig(), store_root)
    experiment = client.get_experiment_by_name("ingot").experiment_id
    run = client.search_runs([experiment], filter_string="tags.`ingot.node` = 'pretrain'")[0]
    assert history_of(client, run.info.run_id) == expected(rows)
    assert run.info.status == "FINISHED"


def test_a_dead_mlflow_is_a_transient_fault_with_a_way_out(store_root: Path, short_requests: None) -> None:
    config = TrackingConfig(uri=f"http://user:c4n4ry@127.0.0.1:{free_port()}", timeout_s=1)
    with pytest.raises(TransientError, match="tracking pending") as caught, reachable(str(config.uri), what="promote"):
        connect(config, store_root).search_runs(["0"])
    assert "ingot sync" in str(caught.value)
    assert "c4n4ry" not in str(caught.value)
    assert caught.value.exit_code == 4


@contextlib.contextmanager
def mlflow_server(database: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Serve a database over HTTP; yields the address and the id of the process group."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(folder), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = (folder.parent / "server.log").open("wb")
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT, env=quiet)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                break
            time.sleep(0.1)
        else:
            raise AssertionError((folder.parent / "server.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


@pytest.mark.slow
def test_a_server_that_hangs_from_step_5_to_15_loses_no_step(
    store_root: Path,
    tmp_path: Path,
    short_requests: None,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
    expected: Callable[..., Any],
) -> None:
    (tmp_path / "served").mkdir()
    with mlflow_server(store_root / "mlflow.db", tmp_path / "served") as (uri, group):
        config = TrackingConfig(uri=uri, timeout_s=1, finish_s=30)
        session = open_session(config, store_root, run_id="r1", recipe="smoke", params={}, data_hash=None)
        added = 0.0
        with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
            run_id = stage.run_id
            for row in rows:
                if row["step"] == 5:
                    session.flush(10.0)
                    os.killpg(group, signal.SIGSTOP)
                if row["step"] == 15:
                    session.flush(10.0)
                    os.killpg(group, signal.SIGCONT)
                metrics = {key: value for key, value in row.items() if key != "step"}
                started = time.monotonic()
                stage.report(Progress("pretrain", row["step"], 20, "steps", metrics=metrics))
                added += time.monotonic() - started
            stage.finish(publish(rows, summary={"family": "decoder"}), cached=False)
        assert session.pending
        session.close("done")
        assert not session.pending
        assert added < ADDED_LIMIT_S
        assert session.url is not None
        assert session.url.startswith(f"{uri}/#/experiments/")
        client = connect(config, store_root)
        assert history_of(client, run_id or stage.run_id) == expected(rows)


@pytest.mark.slow
def test_a_slow_server_is_asked_little_and_delays_nothing(
    store_root: Path,
    tmp_path: Path,
    publish: Callable[..., Artifact],
    rows: list[dict[str, Any]],
    history_of: Callable[..., Any],
    expected: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every request takes a second longer: a run of one stage makes a dozen, and waits for them at its end alone."""
    (tmp_path / "served").mkdir()
    made = publish(rows, summary={"validation_loss": 1.5})
    with (
        mlflow_server(store_root / "mlflow.db", tmp_path / "served") as (uri, _),
        SlowProxy(uri, 1.0).serving() as proxy,
    ):
        config = TrackingConfig(uri=proxy.url.replace("//", "//user:c4n4ry@"), finish_s=60)
        started = time.monotonic()
        session = open_session(config, store_root, run_id="r1", recipe="smoke", params={"a": 1}, data_hash=None)
        with session.stage("pretrain", fingerprint="f" * 64, params={"b": 2}) as stage:
            stage.report(Progress("pretrain", 1, 20, "steps", metrics={"loss": 9.0}))
            stage.finish(made, cached=False)
        assert time.monotonic() - started < 1.0
        session.close("done")
        assert not session.pending
        assert len(proxy.requests) <= REQUESTS_OF_ONE_STAGE, "\n".join(proxy.requests)
        assert history_of(connect(TrackingConfig(uri=uri), store_root), stage.run_id)["loss"] == expected(rows)["loss"]
        told = capfd.readouterr()
        assert "c4n4ry" not in told.out + told.err
