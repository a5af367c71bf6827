"""Real gloo ranks, forked from one process that has imported torch already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one request ended."""

    codes: list[int]
    results: list[Any]

    @property
    def result(self) -> dict[str, Any]:
        """What rank 0 returned, after checking that every rank ended well and that all returned the same."""
        assert self.codes == [0] * len(self.codes), self
        result: dict[str, Any] = self.results[0]
        return result


Ranks = Callable[..., Outcome]


@pytest.fixture(scope="session")
def _rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], Outcome]]:
    scratch = tmp_path_factory.mktemp("ranks")
    with (scratch / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_server.py")), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert server.stdin is not None
    assert server.stdout is not None
    inbox, outbox = server.stdin, server.stdout

    def ask(request: dict[str, Any]) -> Outcome:
        inbox.write(json.dumps(request) + "\n")
        inbox.flush()
        answer = outbox.readline()
        assert answer, (scratch / "log.txt").read_text()
        return Outcome(**json.loads(answer))

    yield ask
    inbox.close()
    outbox.close()
    server.wait(timeout=60)


@pytest.fixture
def ranks(_rank_server: Callable[[dict[str, Any]], Outcome], tmp_path: Path) -> Ranks:
    """Call `ranks("train", world, folder, faults=[...], **arguments)` to run a scenario of `rank_server.py`."""
    calls = iter(range(1000))

    def run(
        scenario: str, world: int, folder: Path, *, faults: list[dict[str, Any]] | None = None, **arguments: Any
    ) -> Outcome:
        environment = {}
        if faults is not None:
            plan = tmp_path / f"faults-{next(calls)}.json"
            plan.write_text(json.dumps(faults))
            environment["INGOT_FAULTS"] = str(plan)
        request = {"scenario": scenario, "world": world, "folder": str(folder), "environment": environment}
        return _rank_server({**request, "arguments": arguments})

    return run
