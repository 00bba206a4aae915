"""Chromium without a window, for tests that look at what a person would see; they skip where there is none."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = (
    "--headless",
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def program() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def screenshot(url: str, file: Path, width: int = 1400, height: int = 1000, patience: int = 0) -> None:
    """Paint the page in a window of so many pixels into `file`, a PNG.

    `patience` is for how many seconds of its own clock a page may continue fetching and drawing.
    """
    _run(url, patience, f"--screenshot={file}", f"--window-size={width},{height}")
    assert file.exists(), f"Chromium painted nothing of {url}"


def dom(url: str, patience: int = 0) -> str:
    """The page's HTML after its scripts have run; `patience` as for a screenshot."""
    return _run(url, patience, "--dump-dom")


def _run(url: str, patience: int, *options: str) -> str:
    if (found := program()) is None:
        pytest.skip("no Chromium")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        waiting = [f"--virtual-time-budget={patience * 1000}"] if patience else []
        command = [found, *_QUIET, f"--user-data-dir={profile}", *waiting, *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"Chromium: exit {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout
