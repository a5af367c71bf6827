"""An HTTP proxy that waits before it passes a request on: an MLflow at the other end of a bad line. Real sockets."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_NOT_PASSED_ON = {"transfer-encoding", "connection", "content-length", "keep-alive"}


class SlowProxy:
    """A proxy before one server.

    Args:
        upstream: address of the server.
        delay_s: wait before each request.
    """

    def __init__(self, upstream: str, delay_s: float) -> None:
        self.delay_s = delay_s
        self.requests: list[str] = []
        """Method and path of every request so far."""
        self._host = urlsplit(upstream).netloc
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[SlowProxy]:
        """Serve for the length of the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Wait, ask the server, and return status, headers and body of its answer."""
        self.requests.append(f"{method} {path.partition('?')[0]}")
        time.sleep(self.delay_s)
        connection = http.client.HTTPConnection(self._host, timeout=60)
        try:
            connection.request(method, path, body=body or None, headers={**headers, "Host": self._host})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: SlowProxy

    def _pass_on(self) -> None:
        body = self._body()
        headers = {k: v for k, v in self.headers.items() if k.lower() not in {*_NOT_PASSED_ON, "host"}}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
            status, answered, content = self.proxy.forward(self.command, self.path, headers, body)
            self.send_response(status)
            for name, value in answered.items():
                if name.lower() not in _NOT_PASSED_ON:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing."""
