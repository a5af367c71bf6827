"""How the nodes of a stage find each other: addresses, a connection with lines of JSON, and a proof of one secret."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import secrets
import select
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from pipelines.core.errors import ConfigError, TransientError

RENDEZVOUS_VARIABLE = "INGOT_RENDEZVOUS"
"""`HOST:PORT` where the first node listens. Needed outside of Slurm; inside it, `HOST` alone chooses a network."""
KEY_VARIABLE = "INGOT_RENDEZVOUS_KEY"
"""A secret that all nodes of a stage know."""
MEET_S = 300.0
"""How long the first node waits for the others, and they for it."""
HELLO_S = 10.0
"""How long a side of a new connection may take to say who it is."""
TELL_S = 0.5
"""Seconds between signs of life."""
POLL_S = 0.05
_LINE_BYTES = 1 << 22


class Line:
    """A connection that carries lines of JSON, and knows when something last came."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.heard_at = time.monotonic()
        self.ended = False
        self._rest = b""
        self._kept: list[dict[str, Any]] = []

    def send(self, **message: Any) -> None:
        """Send one message; a connection that is no more, or takes none, has ended."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(TELL_S)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
            return
        self.ended = True

    def received(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Return the messages that have come, after waiting for the first at most so long."""
        messages, self._kept = self._kept, []
        wait_s = 0.0 if messages else wait_s
        while not self.ended and select.select([self.connection], [], [], wait_s)[0]:
            wait_s = 0.0
            try:
                text = self.connection.recv(1 << 16)
            except OSError:
                text = b""
            if not text or len(self._rest) > _LINE_BYTES:
                self.ended = True
                break
            self.heard_at = time.monotonic()
            *lines, self._rest = (self._rest + text).split(b"\n")
            messages += [json.loads(line) for line in lines]
        return messages

    def one(self, within_s: float) -> dict[str, Any]:
        """Return the next message.

        Raises:
            TransientError: none came in time.
        """
        deadline = time.monotonic() + within_s
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            if messages := self.received(left):
                self._kept = messages[1:]
                return messages[0]
        raise TransientError("the connection ended, or said nothing")

    def silence(self) -> float:
        """Return the seconds since something came."""
        return time.monotonic() - self.heard_at

    def close(self) -> None:
        """End it."""
        self.ended = True
        self.connection.close()


def parse(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, `[IPV6]:PORT` or `HOST`; an empty host and 0 for what is left out.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        parts = urlsplit(f"//{text}")
        return parts.hostname or "", parts.port or 0
    except ValueError:
        raise ConfigError(
            f"{text!r} is no HOST:PORT", hint="an IPv6 address stands in brackets: [fd00::1]:29400"
        ) from None


def resolved(host: str, port: int) -> list[Any]:
    """Return the addresses of a host.

    Raises:
        ConfigError: its name does not resolve on this machine.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"the name of the first node, {host!r}, does not resolve on {socket.gethostname()}: {error}",
            hint=f"give an address: ${RENDEZVOUS_VARIABLE}=ADDRESS:PORT",
        ) from None


def plain(address: str) -> str:
    """Return an IPv4 address that came in IPv6's clothes as what it is."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def greet(line: Line, key: str) -> dict[str, Any]:
    """Have a node prove that it knows the key, prove the same, and return what it says of itself."""
    nonce = secrets.token_hex(16)
    line.send(nonce=nonce)
    hello = line.one(HELLO_S)
    if not hmac.compare_digest(str(hello["proof"]), _proof(key, "node", nonce)):
        line.send(refused=f"another key: ${KEY_VARIABLE} is not the same on all nodes")
        raise TransientError("a stranger")
    line.send(proof=_proof(key, "first", str(hello["nonce"])))
    return hello


def _proof(key: str, who: str, nonce: str) -> str:
    return hmac.new(key.encode(), f"{who}:{nonce}".encode(), "sha256").hexdigest()


def is_greeted(line: Line, key: str, **about: Any) -> bool:
    """Prove to the first node that this one knows the key, and have it prove the same.

    Args:
        line: the connection.
        key: the secret.
        about: what the first node is told of this one.

    Returns:
        Whether it answered.

    Raises:
        ConfigError: it refuses this node, or does not know the key.
    """
    nonce = secrets.token_hex(16)
    try:
        proof = _proof(key, "node", str(line.one(HELLO_S)["nonce"]))
        line.send(proof=proof, nonce=nonce, **about)
        answer = line.one(HELLO_S)
    except (TransientError, KeyError, ValueError):
        line.close()
        return False
    if "refused" in answer:
        raise ConfigError(f"the first node refuses this one: {answer['refused']}")
    if not hmac.compare_digest(str(answer.get("proof")), _proof(key, "first", nonce)):
        raise ConfigError("what answers as the first node does not know the key")
    return True
