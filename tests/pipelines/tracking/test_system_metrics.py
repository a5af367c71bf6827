"""The machine is measured while a node works, in MLflow's own names, by a thread that waits for nobody."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pipelines.core.stage import Progress
from pipelines.tracking import system_metrics
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.session import open_session

NAMES = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_percentage",
    "system/disk_available_megabytes",
}
WAIT_S = 60.0


def test_samples_have_mlflows_names_and_end_with_the_block() -> None:
    found: list[dict[str, float]] = []
    twice = threading.Event()

    def take(sample: dict[str, float]) -> None:
        found.append(sample)
        if len(found) == 2:
            twice.set()

    with system_metrics.sampled(take, every_s=0.02):
        assert twice.wait(WAIT_S)
    assert set(found[0]) >= NAMES
    assert 0.0 < found[1]["system/system_memory_usage_percentage"] <= 100.0
    for thread in threading.enumerate():
        if thread.name == "system-metrics":
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_they_reach_the_run_of_the_node_beside_its_curves(store_root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.02)
    session = open_session(TrackingConfig(), store_root, run_id="r1", recipe="smoke", params={}, data_hash=None)
    seen = threading.Event()
    feed = session._feed_machine

    def feed_and_tell(node: str, found: dict[str, float]) -> None:
        feed(node, found)
        seen.set()

    monkeypatch.setattr(session, "_feed_machine", feed_and_tell)
    with session.stage("pretrain", fingerprint="f" * 64, params={}) as stage:
        stage.report(Progress("pretrain", 1, 2, "steps", metrics={"loss": 1.0}))
        assert seen.wait(WAIT_S)
    session.close("done")
    assert session._mirror is not None
    metrics = session._mirror._client.get_run(session.stage_id("pretrain")).data.metrics
    assert set(metrics) >= NAMES | {"loss"}
