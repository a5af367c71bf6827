"""What the machine does while a node is at work: processor, memory, disk, network and GPUs, in MLflow's own names.

MLflow's monitors measure. Its own thread would also send, and wait for the server: ours collects, the feeder sends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)

PREFIX = "system/"
"""MLflow shows metrics of this prefix on a page of their own."""
EVERY_S = 5.0

Emit = Callable[[dict[str, float]], None]


@contextlib.contextmanager
def sampled(emit: Emit, *, every_s: float | None = None) -> Iterator[None]:
    """Hand the machine's metrics over every so many seconds, for the length of the block.

    Args:
        emit: receives name -> value, on a thread of its own; has to be quick.
        every_s: seconds, `EVERY_S` when None; a shorter block has no sample.
    """
    over = threading.Event()
    thread = threading.Thread(
        target=_sample, args=(emit, EVERY_S if every_s is None else every_s, over), name="system-metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()


def _sample(emit: Emit, every_s: float, over: threading.Event) -> None:
    if over.wait(every_s):
        return  # a node from the store: MLflow's monitors are not even imported
    monitors = _monitors()
    while not over.wait(every_s):
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= {PREFIX + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        emit(found)


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:  # no library; no driver or card
        log.debug("no GPU is measured: %s", error)
    return monitors
