"""Pages in a headless Chromium."""

import json
import os
import shutil
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
# The colours of another scheme come with the next frames, and some of them fade in.
SETTLED = """(async () => {
    if (document.readyState != "complete") await new Promise(done => addEventListener("load", done))
    for (const _ of [1, 2]) await new Promise(requestAnimationFrame)
    await Promise.allSettled(document.getAnimations().map(each => each.finished))
})()"""


class Browser:
    """One browser for many pages. It speaks the DevTools protocol over two pipes: JSON texts that end with a NUL."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.commands = commands
        self.answers = answers
        self.calls = 0
        self.page: Path | None = None
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> Any:
        self.calls += 1
        command = {"id": self.calls, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.calls:
                return answer["result"]

    def _message(self) -> bytes:
        message = bytearray()
        while not message.endswith(b"\0"):
            byte = self.answers.read(1)
            assert byte, "Chromium has ended"
            message += byte
        return bytes(message[:-1])

    def value(self, script: str) -> Any:
        """The value, through JSON, of a JavaScript expression in the open page; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def measured(self, page: Path, script: str, width: int, dark: bool = False) -> Any:
        """`value` in a page that is `width` pixels wide and 900 high; the page is loaded unless it is open."""
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        if page != self.page:
            self.call("Page.navigate", url=page.as_uri())
            self.page = page
        self.value(SETTLED)
        return self.value(script)

    def picture(self, file: Path) -> None:
        file.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def opened() -> Iterator[Browser]:
    assert CHROMIUM
    its_commands, commands = os.pipe()
    answers, its_answers = os.pipe()
    script = f'exec "$@" 3<&{its_commands} 4>&{its_answers}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(its_commands, its_answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_commands)
        os.close(its_answers)
        try:
            with os.fdopen(commands, "wb", buffering=0) as to, os.fdopen(answers, "rb") as back:
                browser = Browser(to, back)
                yield browser
                browser.session = {}
                browser.call("Browser.close")
        finally:
            started.kill()
            started.wait()


def first_screen(page: Path) -> list[tuple[bool, bool]]:
    """True where nothing is wider than the page, and where the verdict ends in the first 700 pixels; on two screens."""
    script = """[document.documentElement.scrollWidth <= innerWidth,
        document.querySelector(".verdict").getBoundingClientRect().bottom < 700]"""
    with opened() as browser:
        return [
            tuple(browser.measured(page, script, width, dark=width == 390)) for width in (390, 1400)
        ]


def measured(page: Path, script: str, width: int, dark: bool = False) -> Any:
    with opened() as browser:
        return browser.measured(page, script, width, dark)
