"""A registry at the other end of a bad line is asked little. Real server; requests are counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.tracking.slow_proxy import SlowProxy
from tests.pipelines.tracking.test_outage import mlflow_server

FILES = "mlflow-artifacts/artifacts/"
"""In the path of what sends or fetches one file; these go several at a time."""
LISTED = ["GET artifacts", "GET artifacts"]
"""MLflow's download asks whether it is a folder, and then what is in it."""
OF_THE_CHAMPION = ["GET registered-models/alias", "GET model-versions/get-download-uri", *LISTED]
OF_A_PROMOTION = [
    "GET model-versions/search",
    "GET runs/get",
    "POST model-versions/create",
    "POST registered-models/alias",
    "GET model-versions/get-download-uri",
    *LISTED,
    "POST model-versions/set-tag",
    "GET registered-models/get",
    "POST model-versions/set-tag",
    "POST registered-models/alias",
    "DELETE registered-models/alias",
]


@pytest.mark.slow
def test_a_promotion_asks_for_nothing_twice(
    store_root: Path, tmp_path: Path, world_at: Callable[[Path, str], Any]
) -> None:
    (tmp_path / "served").mkdir()
    with (
        mlflow_server(store_root / "mlflow.db", tmp_path / "served") as (uri, _),
        SlowProxy(uri, 0.05).serving() as proxy,
    ):
        world = world_at(store_root, proxy.url)
        world.promote(world.candidate(2.0))
        client = world.client()
        run = client.create_run(client.get_experiment_by_name("ingot").experiment_id).info.run_id
        world.tracking = world.tracking.model_copy(update={"run_id": run})
        better = world.candidate(1.9, seed=1)
        proxy.requests.clear()
        world.promote(better)
        asked = [request for request in proxy.requests if FILES not in request]
        assert [_short(request) for request in asked] == OF_THE_CHAMPION + OF_A_PROMOTION
        model, evidence = world.model_folder, 5
        sent = sum(request.startswith("PUT ") for request in proxy.requests)
        fetched = len(proxy.requests) - len(asked) - sent
        assert fetched == evidence + len(list(model.iterdir()))
        described, tokenizer = 6, 2
        assert sent == fetched + described + tokenizer


def _short(request: str) -> str:
    method, _, path = request.partition(" ")
    return f"{method} {path.rpartition('mlflow/')[2].rpartition('mlflow-artifacts/')[2]}"
