"""The Prefect server of a run: the configured one must answer at the start; it may be away later, or not be there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows import prefect_server
from flows.run_record import Runs
from pipelines.core.errors import ConfigError, TransientError
from tests.flows.prefect_process import Server

CHECKOUT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "flows", "run", "--recipe", "smoke", "--only", "promote", "--force", "promote"]


def test_a_configured_server_is_used_and_must_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(prefect_server.time, "monotonic", iter(range(0, 1000, 10)).__next__)
    with pytest.raises(TransientError, match="does not answer") as error:
        prefect_server.prepare(tmp_path)
    assert "unset PREFECT_API_URL" in str(error.value)


def test_the_active_profile_names_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert prefect_server.configured_url() is None
    (tmp_path / "profiles.toml").write_text('active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://there/api"\n')
    assert prefect_server.configured_url() == "http://there/api"


PROXIES = ("ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "SSL_CERT_FILE")
UNUSABLE = [
    {"ALL_PROXY": "socks5://127.0.0.1:7891"},
    {"all_proxy": "socks://127.0.0.1:7891"},
    {"https_proxy": "ftp://127.0.0.1"},
    {"SSL_CERT_FILE": "/nonexistent/cacert.pem"},
]


@pytest.mark.parametrize("set_to", UNUSABLE)
def test_proxies_and_certificates_that_cannot_be_used_matter_to_a_distant_server_alone(
    set_to: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    ((variable, value),) = set_to.items()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        prefect_server._check_proxies("https://prefect.example.org/api")
    assert f"{variable}={value}" in str(caught.value)
    prefect_server._check_proxies("http://127.0.0.1:4200/api")
    assert variable not in os.environ


def test_a_flow_runs_alone_under_any_proxy_without_certificates_and_without_a_home(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom flows import prefect_server, prefect_client\n"
        f"prefect_server.prepare(Path({str(tmp_path)!r}))\nimport prefect\n"
        "with prefect_client.alone():\n"
        "    task = prefect.task(lambda: 20, name='twenty')\n"
        "    print(prefect.flow(lambda: task() + 1, name='one-more')())\n"
    )
    hostile = {key: value for each in UNUSABLE for key, value in each.items()} | {"http_proxy": "http://127.0.0.1:9"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_") and key != "HOME"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=CHECKOUT, env=kept | hostile, capture_output=True, text=True)
    assert done.stdout == "21\n", done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_goes_away_in_mid_run_changes_nothing(smoke_store: Path, server: Server, tmp_path: Path) -> None:
    store = Path(server.environment["INGOT_STORE"])
    shutil.copytree(smoke_store, store)
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps([{"point": "artifact.before_manifest", "action": "SIGSTOP"}]))
    environment = server.environment | {"INGOT_FAULTS": str(faults)}
    process = psutil.Popen(RUN, cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, text=True)
    server.wait("the node is at work", lambda: process.status() == psutil.STATUS_STOPPED)
    (newest,) = server.ask("POST", "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    server.kill()
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "Prefect does not answer" in said
    assert Runs(store).get().status == "done"
    assert newest["name"] == Runs(store).get().id


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_runs_may_start_together(
    smoke_store: Path, tmp_path: Path, environment_of: Callable[[Path], dict[str, str]]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(smoke_store, store)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(RUN, cwd=CHECKOUT, env=environment_of(store), **pipes) for _ in range(3)]
    ended = [(process.communicate(timeout=400)[0], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert [run.status for run in Runs(store).all()[-3:]] == ["done"] * 3
