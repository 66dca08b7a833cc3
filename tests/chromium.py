"""Drive Chromium over its debugging pipe, for tests of pages: no driver, no port, no dependency.

    with Browser(folder) as browser:
        page = browser.open(url, width=320, dark=True)
        page.press("Tab")
        assert page.run("document.activeElement.id") == "axis"

Chromium reads commands of its DevTools protocol from file descriptor 3 and writes answers and
events to 4: JSON, each message ended by a NUL.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    # A container's root has no sandbox, and often a small /dev/shm.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Gives Chromium its two descriptors, whatever their numbers are here, and becomes it.
START = """
import os, sys
reads, writes, *command = sys.argv[1:]
os.dup2(int(reads), 3)
os.dup2(int(writes), 4)
os.execv(command[0], command)
"""
# Seconds until a browser that does not answer fails the test; a busy machine takes many.
PATIENCE = 120.0
# Lets a page be asked what its policy refused, and whether hostile text ran.
OBSERVE = """
window.violations = [];
addEventListener("securitypolicyviolation", event =>
  window.violations.push(event.effectiveDirective + " " + event.blockedURI));
"""
KEY_CODES = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "PageUp": 33,
    "PageDown": 34,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def needed() -> str:
    """Return the path of Chromium or Chrome; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine (Debian: apt-get install chromium)")
    return found


class Browser:
    """A Chromium with a profile of its own in `folder`. It ends with the `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Browser:
        program = needed()
        theirs_in, self.writes = os.pipe()
        self.reads, theirs_out = os.pipe()
        # Not 3 or 4, which would be overwritten before they are copied.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (theirs_in, theirs_out)]
        os.close(theirs_in)
        os.close(theirs_out)
        profile = f"--user-data-dir={self.folder / 'profile'}"
        command = [sys.executable, "-I", "-c", START, *map(str, high), program, *FLAGS, profile]
        self.log = open(self.folder / "chromium.log", "wb")  # noqa: SIM115 - as long as the browser
        self.process = subprocess.Popen(
            [*command, "about:blank"], pass_fds=high, stdout=self.log, stderr=self.log
        )
        for one in high:
            os.close(one)
        self.received = b""
        self.sent = 0
        self.pages: dict[str, Page] = {}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self.writes)
            os.close(self.reads)
            self.log.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict:
        """Return the answer to a command of the protocol. Events before it reach their pages."""
        self.sent += 1
        message: dict[str, Any] = {"id": self.sent, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        answer = self._receive(lambda reply: reply.get("id") == message["id"], method)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self, wanted: Callable[[dict], bool], what: str) -> dict:
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.received:
                ready, _, _ = select.select([self.reads], [], [], max(0, until - time.monotonic()))
                piece = os.read(self.reads, 1 << 20) if ready else b""
                said = (self.folder / "chromium.log").read_text(errors="replace")[-2000:]
                assert piece, f"the browser does not answer {what}: {said}"
                self.received += piece
            text, _, self.received = self.received.partition(b"\0")
            message = json.loads(text)
            if page := self.pages.get(message.get("sessionId")):
                page.event(message)
            if wanted(message):
                return message

    def open(
        self,
        url: str,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        media: str = "screen",
        before: str = "",
    ) -> Page:
        """Return a page of `url` after its load event. before: script to run before its own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.look(dark, media)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=OBSERVE + before)
        page.call("Page.navigate", url=url)
        page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """A tab. errors, requests: its uncaught errors and the addresses it asked for, so far."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict:
        return self.browser.call(method, self.session, **params)

    def event(self, message: dict) -> None:
        """Take note of what happened."""
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            described = details.get("exception", {}).get("description", "")
            self.errors.append(described or details["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def run(self, script: str) -> Any:
        """Return the value of an expression, after its promise if it is one."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        failed = answer.get("exceptionDetails")
        assert not failed, failed.get("exception", failed)
        return answer["result"].get("value")

    def until(self, condition: str) -> Any:
        """Return the first value of an expression that is true. It is asked again and again."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"it did not become true: {condition}"
            time.sleep(0.02)
        return value

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys, one after the other: their names, or a character each."""
        for key in keys:
            code = KEY_CODES.get(key) or ord(key.upper())
            held: dict[str, Any] = dict(
                key=key, windowsVirtualKeyCode=code, modifiers=8 if shift else 0
            )
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **held)
            self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def type(self, text: str) -> None:
        """Insert text where the focus is, as a keyboard would."""
        self.call("Input.insertText", text=text)

    def point(self, x: float, y: float) -> None:
        """Move the mouse to CSS pixels of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click the middle of the first element that a CSS selector finds."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            'e.scrollIntoView({block: "center"}); const b = e.getBoundingClientRect();'
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def look(self, dark: bool, media: str = "screen") -> None:
        """Prefer dark or light colours, on a screen or on paper (media "print")."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """Write a PNG of the page: the whole of it, or what the window shows."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
        return path

    def violations(self) -> list[str]:
        """Return what the page's content security policy refused."""
        return self.run("window.violations")

    def close(self) -> None:
        del self.browser.pages[self.session]
        self.browser.call("Target.closeTarget", targetId=self.target)
