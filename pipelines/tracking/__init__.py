"""MLflow tracking that never delays and never fails a stage."""

from __future__ import annotations

from pipelines.tracking.session import Session, StageRun, open_session
from pipelines.tracking.sync import SyncResult, sync

__all__ = ["Session", "StageRun", "SyncResult", "open_session", "sync"]
