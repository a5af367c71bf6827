"""Chromium without a screen, driven over its DevTools protocol: open a page, wait until it is drawn, photograph it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from websockets.sync.client import connect
from websockets.sync.connection import Connection

from pipelines.core.errors import ConfigError, TransientError

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_LIMIT_S = 60.0
_SETTLED_S = 1.5
"""How long a page must stay the same before it is taken for drawn."""
_STILL_S = 6.0
"""The same of its picture: what is drawn on a canvas comes late."""
_COLOURS = 64


class Page:
    """One tab.

    Args:
        socket: its DevTools connection.
    """

    def __init__(self, socket: Connection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def open(self, url: str, *, width: int, height: int, shows: str) -> None:
        """Open a page, and wait until it shows a text and stays the same.

        Args:
            url: the address.
            width: of the window.
            height: of the window.
            shows: text that the page shows when it is complete.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self._ask("Page.navigate", url=url)
        self._wait(f"document.body && document.body.innerText.includes({json.dumps(shows)})", f"{url} shows {shows!r}")
        self._settle()

    def remember(self, items: Mapping[str, str]) -> None:
        """Keep items in the local storage of the page's site, as if its user had chosen so before."""
        for key, value in items.items():
            self._run(f"localStorage.setItem({json.dumps(key)}, {json.dumps(value)})")

    def click(self, selector: str) -> None:
        """Click on the first element of a CSS selector, and wait until the page stays the same.

        Raises:
            TransientError: the page has no such element.
        """
        self._wait(f"!!document.querySelector({json.dumps(selector)})", f"the page has {selector}")
        self._run(f"document.querySelector({json.dumps(selector)}).click()")
        self._settle()

    def change_remembered(self, key: str, **changes: Any) -> None:
        """Change fields of a JSON item that the site keeps in its local storage."""
        kept = self._run(f"localStorage.getItem({json.dumps(key)})")
        if kept is None:
            raise TransientError(f"the site keeps no {key}")
        self.remember({key: json.dumps(json.loads(kept) | changes)})

    def photograph(self, target: Path) -> None:
        """Write the window as a PNG of few colours, without empty room at its lower end."""
        from PIL import Image, ImageChops

        raw = target.with_suffix(".raw.png")
        raw.write_bytes(self._still())
        try:
            image = Image.open(raw).convert("RGB")
            ground = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
            drawn = ImageChops.difference(image, ground).getbbox()
            if drawn is None:
                raise TransientError(f"the page for {target.name} stayed empty")
            bottom = min(image.height, drawn[3] + 24)
            image.crop((0, 0, image.width, bottom)).quantize(_COLOURS).save(target, optimize=True)
        finally:
            raw.unlink()

    def _still(self) -> bytes:
        """Return the window as a PNG once it looks the same for a while: drawings on a canvas come late, and move."""
        deadline, last = time.monotonic() + _LIMIT_S, b""
        while True:
            now = base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])
            if now == last or time.monotonic() > deadline:
                return now
            last = now
            time.sleep(_STILL_S)

    def _settle(self) -> None:
        """Wait until the page has stayed the same for a while."""
        deadline, last, since = time.monotonic() + _LIMIT_S, "", time.monotonic()
        while time.monotonic() - since < _SETTLED_S:
            now = str(self._run("document.body.innerHTML.length + ' ' + document.body.innerText.length"))
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise TransientError("the page never comes to rest")
            time.sleep(0.1)

    def _wait(self, condition: str, what: str) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not self._run(condition):
            if time.monotonic() > deadline:
                raise TransientError(f"not within {_LIMIT_S:g} s: {what}")
            time.sleep(0.1)

    def _run(self, script: str) -> Any:
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=_LIMIT_S))
            if answer.get("id") == number:
                if "error" in answer:
                    raise TransientError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """Start a browser with a fresh profile for the length of the block.

    Raises:
        ConfigError: there is no Chromium.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        raise ConfigError(f"none of {', '.join(_NAMES)} is installed", hint="apt-get install chromium")
    options = [
        "--headless",
        "--no-sandbox",
        "--enable-unsafe-swiftshader",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ]
    process = subprocess.Popen(
        [browser, *options, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + _LIMIT_S
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TransientError(f"{browser} does not start")
            time.sleep(0.1)
        port = port_file.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_LIMIT_S) as answer:
            tab = next(found for found in json.load(answer) if found["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait()
