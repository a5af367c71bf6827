"""A window of steps traced operation by operation, by torch's own profiler, on rank 0.

`trace.json.gz` opens in a browser at ui.perfetto.dev; `operations.txt` is its table of the dearest operations. Both are
observations: a traced run trains the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from pipelines.core import artifact
from pipelines.training.callbacks import Callback
from pipelines.training.config import ProfileConfig
from pipelines.training.distributed import Ranks
from pipelines.training.trainer import StepResult, Trainer
from pipelines.training.worker_spec import WorkerSpec

_ROWS = 40
"""Operations in the table."""


class Profiling(Callback):
    """Traces the steps of the window.

    A training that goes on behind the window's first step traces nothing. One that is stopped inside of it leaves no
    trace, and starts the window anew where it goes on from a checkpoint before it.

    Args:
        window: which steps.
        folder: where the two files go.
    """

    def __init__(self, window: ProfileConfig, folder: Path) -> None:
        self._window, self._folder = window, folder
        self._profiler: profile | None = None
        self._step: record_function | None = None

    def before_step(self, trainer: Trainer) -> None:
        """Begin with the window's first step; name each step in the trace."""
        if trainer.state.step == self._window.start:
            self.close()  # after a return to a checkpoint the window is traced anew
            activities = [ProfilerActivity.CPU]
            if trainer.engine.ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()
        if self._profiler is not None:
            self._step = record_function(f"step {trainer.state.step + 1}")
            self._step.__enter__()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write both files after the window's last step."""
        if self._profiler is None:
            return
        self._end_step()
        if result.step < self._window.start + self._window.steps:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = f"self_{trainer.engine.ranks.device.type}_time_total"
        artifact.write_text(
            self._folder / "operations.txt", profiler.key_averages().table(sort_by=order, row_limit=_ROWS)
        )

    def close(self) -> None:
        """End a window that was left before its last step."""
        if self._profiler is not None:
            self._end_step()
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _end_step(self) -> None:
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(None, None, None)


@contextlib.contextmanager
def opened_profile(spec: WorkerSpec, ranks: Ranks) -> Iterator[list[Callback]]:
    """Give the callback where a window is asked for, on rank 0 only."""
    if spec.config.profile is None or ranks.rank != 0:
        yield []
        return
    profiling = Profiling(spec.config.profile, spec.profile)
    try:
        yield [profiling]
    finally:
        profiling.close()
