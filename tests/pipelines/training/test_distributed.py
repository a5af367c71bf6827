"""Where ranks meet: nothing outside the machine can read or write what they exchange."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from pipelines.core import launcher
from pipelines.training import distributed


@pytest.mark.slow
def test_two_ranks_listen_on_the_loopback_only(tmp_path: Path) -> None:
    script = Path(__file__).with_name("meeting_worker.py")
    launcher.launch([sys.executable, str(script)], world_size=2, log_dir=tmp_path, env={"OMP_NUM_THREADS": "1"})
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}.log").read_text()
        assert "listens on 127.0.0.1 store" in said, said


def test_a_port_that_another_process_took_is_told_in_the_words_that_the_launcher_looks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "")
        with pytest.raises(OSError, match=r"(?i)address already in use"):
            distributed.meet()


def test_without_a_launcher_torch_does_as_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "")
    assert distributed.meet.__wrapped__() is None
