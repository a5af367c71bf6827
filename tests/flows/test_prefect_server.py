"""A private Prefect API: it answers, it ends with the block, and it dies with a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows import prefect_server
from pipelines.core.errors import TransientError

CHECKOUT = Path(__file__).resolve().parents[2]


def test_a_configured_server_is_used_and_must_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(prefect_server.time, "monotonic", iter(range(0, 1000, 10)).__next__)
    with pytest.raises(TransientError, match="does not answer") as error, prefect_server.api(tmp_path):
        pass
    assert "unset PREFECT_API_URL" in str(error.value)


def test_the_active_profile_names_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert prefect_server.configured_url() is None
    (tmp_path / "profiles.toml").write_text('active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://there/api"\n')
    assert prefect_server.configured_url() == "http://there/api"


@pytest.mark.slow
def test_a_private_server_answers_and_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom flows.prefect_server import api\n"
        "with api(Path(sys.argv[1])) as url:\n    print(url, flush=True)\n    time.sleep(600)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")} | {
        "HOME": str(tmp_path)
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, env=clean, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            assert answer.status == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 15
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)
