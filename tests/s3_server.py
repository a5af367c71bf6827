"""A real S3 server (SeaweedFS) on this machine, for the length of a test session."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipelines.core import parent_guard

WEED = Path(sysconfig.get_path("scripts")) / "weed"
BUCKET = "corpus"
KEY, SECRET = "test", "c4n4ry-s3cret"
_LISTENERS = (
    "master.port", "volume.port", "filer.port", "s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance",
    "metricsPort", "master.port.grpc", "volume.port.grpc", "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip


@dataclass(frozen=True)
class S3Server:
    """A server with an empty bucket."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which everybody reaches it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.address,
            "AWS_REGION": "us-east-1",
        }

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let it answer nobody for the length of the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Serve S3 from a folder; the secret is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    with contextlib.ExitStack() as stack:
        # Every listener gets a port of its own: servers of other tests may run beside this one.
        sockets = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in _LISTENERS}
        ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                *parent_guard.command(), str(WEED), "mini", f"-dir={folder / 'data'}",
                "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                f"-bucket={BUCKET}", "-webdav=false", "-admin.ui=false", f"-s3.config={folder / 's3.json'}",
                *(f"-{name}={port}" for name, port in ports.items()),
            ],
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
        )  # fmt: skip
    try:
        made = S3Server(f"http://127.0.0.1:{ports['s3.port']}", server)
        _wait_for_bucket(made, folder / "log")
        yield made
    finally:
        server.kill()
        server.wait()


def _wait_for_bucket(server: S3Server, log: Path) -> None:
    """Wait until the server has made its bucket: it listens earlier."""
    client = boto3.client(
        "s3",
        endpoint_url=server.address,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.process.poll() is None, log.read_text()[-2000:]
        try:
            client.head_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text()[-2000:])
