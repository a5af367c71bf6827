"""Containers, as far as can be told without building them: pinned, never root, on the loopback, without passwords."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((CHECKOUT / "infra" / "docker").glob("*.Dockerfile"))
COMPOSE = CHECKOUT / "infra" / "compose.yaml"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_runs_as_nobody_in_particular(path: Path) -> None:
    lines = [line for line in path.read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"[\w/.]+:[\w.]*\d+\.\d+[\w.-]*", base)
    assert [line for line in lines if line.startswith("USER ")] == ["USER ingot"]
    after = lines[lines.index("USER ingot") :]
    assert not any(line.startswith(("RUN", "COPY")) for line in after)
    assert all("--constraint flows/constraints.txt" in line for line in lines if "pip install" in line)


def test_services_are_pinned_and_listen_to_this_machine_alone() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {"postgresql", "s3", "prefect", "mlflow", "worker"} <= services.keys()
    for service in services.values():
        assert re.fullmatch(r"ingot:cpu|[\w/]+:\d+\.\d+[\w.-]*", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for other in service.get("depends_on", []):
            assert other in services


def test_every_password_comes_from_outside() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    values = [pair for service in services for pair in service.get("environment", {}).items()]
    secret = [value for name, value in values if re.search(r"PASSWORD|SECRET|AUTH_STRING|DATABASE|STORE_URI", name)]
    assert len(secret) > 8
    assert all("${PASSWORD" in value for value in secret)
