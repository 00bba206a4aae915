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


def screenshot(url: str, file: Path, width: int = 1400, height: int = 1000) -> None:
    """Paint the page in a window of so many pixels into `file`, a PNG."""
    _run(url, f"--screenshot={file}", f"--window-size={width},{height}")
    assert file.exists(), f"Chromium painted nothing of {url}"


def dom(url: str) -> str:
    """The page's HTML after its scripts have run."""
    return _run(url, "--dump-dom")


def _run(url: str, *options: str) -> str:
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [program, *_QUIET, f"--user-data-dir={profile}", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"Chromium: exit {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout
