"""What needs a cluster: a real Slurm of two nodes on this host."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import slurm_servers
from tests.cluster.slurm_servers import Slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """The cluster of this session."""
    if reason := slurm_servers.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is at most 107 bytes
    folder.chmod(0o755)  # munged refuses a folder that others could replace
    with slurm_servers.running(folder) as slurm:
        yield slurm
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(cluster: Slurm, tmp_path: Path) -> Iterator[Slurm]:
    """The cluster, with both nodes idle and nothing of the test left behind."""
    yield cluster
    slurm_servers.wait_for(lambda: not cluster.active(), "the jobs of the test to end")
    ended = psutil.process_iter(["cmdline"])
    left = [each for each in ended if any(str(tmp_path) in part for part in each.info["cmdline"] or [])]
    assert left == []
