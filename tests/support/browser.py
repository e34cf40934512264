"""Headless Chromium over the pipe of its remote debugging protocol: no driver, no port, nothing to install but itself.

Two file descriptors carry JSON messages, each ended by a zero byte
(https://chromedevtools.github.io/devtools-protocol/).
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.patience import DEADLINE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # small in containers
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# The browser reads descriptor 3 and writes 4. Both are moved out of each other's way first.
STARTER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if os.path.exists(MAC) else None)


class Page:
    """One page. What JavaScript gives comes back as Python values."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, receive
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.log: list[str] = []  # what the page complained about
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict:
        deadline = time.monotonic() + DEADLINE
        while b"\0" not in self._buffer:
            assert select.select([self._receive], [], [], max(0, deadline - time.monotonic()))[0], "no answer"
            piece = os.read(self._receive, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict) -> None:
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.log.append(json.dumps(event["params"]))

    def open(self, url: str) -> None:
        assert "errorText" not in self.command("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Until an expression is true; its value."""
        deadline = time.monotonic() + DEADLINE
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never came: {script}; {self.log}"
            time.sleep(0.1)
        return value

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )

    def scheme(self, name: str) -> None:
        """dark or light"""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path: Path) -> None:
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile in the folder `profile`."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()
    command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    starter = [sys.executable, "-c", STARTER, str(to_browser), str(from_browser), *command]
    process = subprocess.Popen(
        starter, pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        page = Page(send, receive)
        yield page
        page._session = None
        page.command("Browser.close")
        process.wait(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(send)
        os.close(receive)
