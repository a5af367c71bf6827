"""data status|pull|push|add|import: DVC behind five words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipelines.core import project
from pipelines.data import versioning
from pipelines.data.config import DataConfig


def run(verb: str, *arguments: Any, as_json: bool) -> None:
    """Run one of the verbs on the corpus of this project and print its result."""
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "status": versioning.status,
        "pull": versioning.pull,
        "push": versioning.push,
        "add": versioning.add,
        "import": versioning.import_url,
    }
    result = verbs[verb](DataConfig(), project.find(), *arguments)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key:<12}{value}")
