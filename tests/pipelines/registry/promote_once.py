"""Run one promotion in a process of its own: `promote_once.py JOB`, a JSON file with the store and the inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.core import artifact
from pipelines.core.errors import IngotError
from pipelines.core.stage import StageContext, TrackingTarget
from pipelines.registry import stage
from pipelines.registry.config import PromoteConfig

job = json.loads(Path(sys.argv[1]).read_text())
root, out = Path(job["store"]), Path(job["out"])
out.mkdir(parents=True, exist_ok=True)
(out / "scratch").mkdir(exist_ok=True)
inputs = {name: artifact.load(Path(path)) for name, path in job["inputs"].items()}
context = StageContext(
    node="promote", scratch=out / "scratch", tracking=TrackingTarget.model_validate(job["tracking"]), store=root
)
try:
    print(json.dumps(stage.run(PromoteConfig(), inputs, out, context)))
except IngotError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
