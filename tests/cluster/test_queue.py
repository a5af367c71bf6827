"""Two hundred jobs in the queue of a cluster that runs two at a time: none is lost, doubled or stuck."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import pytest

from flows import executors
from pipelines.core.compute import ComputeConfig
from tests.cluster.slurm_servers import Slurm, wait_for
from tests.pipelines.core.toy_stages import request

pytestmark = [pytest.mark.slow, pytest.mark.cluster_full, pytest.mark.timeout(1800)]

JOBS, LIMIT = 200, 2


@pytest.mark.parametrize("limited_by", ["the queue", "compute.parallel"])
def test_two_hundred_runs_with_a_limit_of_two_all_end_once(slurm: Slurm, tmp_path: Path, limited_by: str) -> None:
    """In the queue: jobs that want a node each, on two nodes. By `compute.parallel`: that many are ever submitted."""
    count = JOBS if limited_by == "the queue" else JOBS // 5
    compute = ComputeConfig(executor="slurm", parallel=64 if limited_by == "the queue" else LIMIT, grace_s=5.0)
    executor, journal = executors.get(compute), tmp_path / "journal"
    asked = [
        request(
            tmp_path / "store", text=f"n{i}", journal=str(journal), compute=compute, alone=limited_by == "the queue"
        )
        for i in range(count)
    ]
    with ThreadPoolExecutor(count if limited_by == "the queue" else LIMIT) as threads:
        made = list(threads.map(lambda one: executor.execute(one, lambda _progress: None), asked))
    assert [(each.path / "out.txt").read_text() for each in made] == [f"n{i}" for i in range(count)]
    lines = journal.read_text().splitlines()
    assert sorted(lines) == sorted([f"+n{i}" for i in range(count)] + [f"-n{i}" for i in range(count)])
    at_work = list(accumulate(1 if line.startswith("+") else -1 for line in lines))
    assert max(at_work) <= LIMIT
    wait_for(lambda: not slurm.active(), "the last jobs to leave the queue")
    assert list((tmp_path / "store" / "jobs").iterdir()) == []
