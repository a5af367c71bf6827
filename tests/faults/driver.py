"""`python driver.py ORDER.json`: make a pretrain artifact as `ingot run` would, and end with its exit code.

A process of its own, so that tests can send it real signals; run it again and it goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.core import artifact
from pipelines.core.compute import ComputeConfig
from pipelines.core.errors import IngotError
from pipelines.core.run_stage import materialize
from pipelines.core.stage import StageContext
from pipelines.core.store import LocalStore
from pipelines.stages import STAGES
from pipelines.training.config import PretrainConfig


def main(order: Path) -> int:
    """Run one order; return the exit code."""
    asked = json.loads(order.read_text(encoding="utf-8"))
    prepared = artifact.load(Path(asked["prepared"]))
    store = LocalStore(Path(asked["store"]))
    context = StageContext(node="pretrain", scratch=store.root, compute=ComputeConfig.model_validate(asked["compute"]))
    try:
        made = materialize(
            STAGES["pretrain"],
            PretrainConfig.model_validate(asked["config"]),
            {"prepare": prepared},
            store,
            context,
            input_keys={"prepare": prepared.manifest.fingerprint},
            data_hash=None,
            wait_s=asked["wait_s"],
        )
    except IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(made.path)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
