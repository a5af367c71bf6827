"""Files of ranks on nodes that share no disk: the folder that the ranks work in is that of the first node.

The process that executes the stage serves that folder to the other nodes of the launch, for as long as it lasts. The
program of another node (`node.py`) brings what the ranks there read: artifacts from the store, and the files that tell
the ranks what to do from the first node. Ranks there hand over what they write, and bring checkpoints, by `of_rank()`.

Each node finds out by itself whether it sees the disk of the first one, by a file with a name that nobody can guess;
where it does, nothing is carried. The address and a secret of the launch come over the connection on which both nodes
have proved that they know the key of the stage; see `nodes.py`. Like all that the ranks say to each other it is not
encrypted.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pipelines.core import artifact
from pipelines.core.errors import ConfigError, IngotError, TransientError
from pipelines.core.store import SCHEME, open_store

VARIABLE = "INGOT_FIRST_NODE"
"""JSON for ranks on a node with a disk of its own: where the first node serves its folder, and the folder here."""
_MARKER = ".seen-"
_PART = ".part-"
_TIMEOUT_S = 60.0
_BLOCK = 1 << 20
_KEY = re.compile(r"/artifacts/([\w.-]+)/([0-9a-f]{16,64})")


@dataclass(frozen=True)
class Workplace:
    """The folder that all ranks of a launch work in, on the disk of the first node.

    Args:
        folder: below the folder that the store has on this machine.
        root: that folder of the store.
        files: names in `folder` that ranks read before they do anything; those that do not exist are left out.
    """

    folder: Path
    root: Path
    files: tuple[str, ...]

    def artifacts(self) -> list[tuple[str, str]]:
        """Return stage and fingerprint of every artifact that the files name."""
        root = _in_json(self.root.resolve())
        named: set[Path] = set()
        for name in self.files:
            with contextlib.suppress(FileNotFoundError):
                text = (self.folder / name).read_text(encoding="utf-8")
                found = (_KEY.match(rest) for rest in text.split(root)[1:])
                named |= {self.root / "artifacts" / match[1] / match[2] for match in found if match}
        manifests = [artifact.load(folder).manifest for folder in sorted(named)]
        return [(manifest.stage, manifest.fingerprint) for manifest in manifests]


# ---- the first node ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(workplace: Workplace, address: str) -> Iterator[dict[str, Any]]:
    """Serve the folder at an address of this machine; gives what the other nodes are told."""
    token, marker = secrets.token_hex(32), workplace.folder / f"{_MARKER}{secrets.token_hex(16)}"

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a rank that was killed has gone in the middle of a sentence, and is told of elsewhere."""

    class Handler(_Handler):
        folder, secret = workplace.folder.resolve(), token

    server = Server((address, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="files for other nodes", daemon=True)
    marker.touch()
    thread.start()
    try:
        yield {
            "address": address,
            "port": server.server_address[1],
            "token": token,
            "marker": marker.name,
            "store": open_store(workplace.root).address,
            "root": str(workplace.root.resolve()),
            "folder": workplace.folder.resolve().relative_to(workplace.root.resolve()).as_posix(),
            "files": list(workplace.files),
            "artifacts": workplace.artifacts(),
        }
    finally:
        marker.unlink(missing_ok=True)
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """GET and PUT of files below one folder; GET of a name that ends in `/` lists what is below it."""

    folder: Path
    secret: str
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Send a file, or a list of files."""
        path = self._asked()
        if path is None:
            return
        if path.is_dir():
            names = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
            self._answer(HTTPStatus.OK, json.dumps(names).encode())
            return
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            self._answer(HTTPStatus.NOT_FOUND)
            return
        with stream:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Length", str(os.fstat(stream.fileno()).st_size))
            self.end_headers()
            shutil.copyfileobj(stream, self.wfile, _BLOCK)

    def do_PUT(self) -> None:
        """Write a file; it appears whole, and on the disk."""
        path = self._asked()
        if path is None:
            return
        part, left = path.with_name(f"{_PART}{path.name}"), int(self.headers["Content-Length"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                while left:
                    block = self.rfile.read(min(left, _BLOCK))
                    if not block:
                        raise ConnectionError
                    stream.write(block)
                    left -= len(block)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            self.close_connection = True
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.INTERNAL_SERVER_ERROR
            self._answer(status, str(error).encode())
            return
        self._answer(HTTPStatus.NO_CONTENT)

    def _asked(self) -> Path | None:
        """Return the path that is asked for; None, once refused, where it is none of ours, or the secret is wrong."""
        path = (self.folder / unquote(self.path.lstrip("/"))).resolve()
        allowed = hmac.compare_digest(self.headers.get("Authorization", ""), self.secret)
        if allowed and path.is_relative_to(self.folder):
            return path
        self.close_connection = True
        self._answer(HTTPStatus.FORBIDDEN)
        return None

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # it went away
            self.send_response(status)
            if self.close_connection:
                self.send_header("Connection", "close")
            if status != HTTPStatus.NO_CONTENT:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - of the base class
        """Say nothing."""


# ---- the other nodes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstNode:
    """The first node, seen from another one that has a disk of its own.

    Args:
        address: where it serves.
        port: there.
        token: secret of the launch.
        folder: the folder on this node that stands for the served one; names below it are asked for.
    """

    address: str
    port: int
    token: str
    folder: Path

    def put(self, source: Path, path: Path) -> None:
        """Hand a file over, to appear there under the name that `path` has below the folder here.

        Raises:
            OSError: the disk there is full.
            TransientError: it does not answer.
        """
        with source.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            with self._asked("PUT", path, stream, {"Content-Length": str(size)}) as answer:
                said = answer.read()
        if answer.status == HTTPStatus.INSUFFICIENT_STORAGE:
            raise OSError(errno.ENOSPC, f"the first node's disk is full: {said.decode(errors='replace')}")
        self._check(answer.status, path)

    def get(self, path: Path, target: Path) -> bool:
        """Bring the file that has the name of `path` there; return False where there is none.

        Raises:
            TransientError: it does not answer.
        """
        with self._asked("GET", path) as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                return False
            self._check(answer.status, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                shutil.copyfileobj(answer, stream, _BLOCK)
        return True

    def get_folder(self, path: Path, target: Path) -> None:
        """Bring all files below the name of `path` there into a folder that has nothing else.

        Raises:
            TransientError: it does not answer.
        """
        shutil.rmtree(target, ignore_errors=True)
        with self._asked("GET", path) as answer:
            names = json.loads(answer.read()) if answer.status == HTTPStatus.OK else []
        for name in names:
            self.get(path / name, target / name)

    def _check(self, status: int, path: Path) -> None:
        if status not in {HTTPStatus.OK, HTTPStatus.NO_CONTENT}:
            raise TransientError(f"the first node at {self.address} answers {status} for {path.name}")

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: Path, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        name = quote(path.relative_to(self.folder).as_posix())
        connection = http.client.HTTPConnection(self.address, self.port, timeout=_TIMEOUT_S, blocksize=_BLOCK)
        try:
            connection.request(method, f"/{name}", body, {"Authorization": self.token, **(headers or {})})
            yield connection.getresponse()
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise TransientError(f"the first node at {self.address} does not answer: {error!r}") from error
        finally:
            connection.close()


def of_rank() -> FirstNode | None:
    """Return the first node where this process is a rank that does not see its disk; None where it does."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    table = json.loads(text)
    return FirstNode(table["address"], table["port"], table["token"], Path(table["folder"]))


@dataclass(frozen=True)
class Here:
    """What a launch is on this node."""

    command: tuple[str, ...]
    log_dir: Path
    env: dict[str, str]


def arrive(told: Mapping[str, Any]) -> Here:
    """Have all that ranks of this node read on a disk of this node, and return how to start them.

    Args:
        told: the first node's message, with `command`, `log_dir`, `env` and, where the ranks work in a folder of the
            store, what `serving` gave.

    Raises:
        ConfigError: neither the disk nor the store is shared.
        IngotError: an artifact is not in the store; the first node does not answer.
    """
    plain = Here(tuple(told["command"]), Path(told["log_dir"]), dict(told["env"]))
    place = told.get("workplace")
    if place is None:
        return plain
    store = open_store(place["store"])
    folder = store.root / place["folder"]
    if (folder / place["marker"]).exists():
        return plain
    if not place["store"].startswith(SCHEME):
        raise ConfigError(
            f"{socket.gethostname()} does not see {folder} of the first node",
            hint="compute.nodes takes a store on a disk that all nodes share, or on S3: store.path=s3://BUCKET/PREFIX",
        )
    for stage, key in place["artifacts"]:
        found = store.find(stage, key)
        if found is None:
            raise IngotError(f"{stage} {key[:12]} is not in {store.address}")
        store.verify(found)
    first = FirstNode(place["address"], place["port"], place["token"], folder)
    old, new = place["root"], str(store.root)
    for name in place["files"]:
        path = folder / name
        path.unlink(missing_ok=True)  # of an earlier attempt
        if first.get(path, path):
            text = path.read_text(encoding="utf-8")
            artifact.write_text(path, text.replace(_in_json(Path(old)), _in_json(store.root)))

    def moved(text: str) -> str:
        return new + text[len(old) :] if text == old or text.startswith(f"{old}/") else text

    table = {"address": first.address, "port": first.port, "token": first.token, "folder": str(folder)}
    env = {**plain.env, VARIABLE: json.dumps(table)}
    return Here(tuple(map(moved, plain.command)), Path(moved(str(plain.log_dir))), env)


def _in_json(path: Path) -> str:
    return json.dumps(str(path))[1:-1]
