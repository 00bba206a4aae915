"""Installed packages for tests of plug-ins: a module and its metadata in a folder on sys.path."""

import importlib
import sys
from pathlib import Path

import pytest


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    package: str,
    module: str,
    code: str,
    entries: str,
    version: str = "1.0",
) -> None:
    """Write what pip would write: `module`.py with `code`, and metadata with `entries` (entry_points.txt)."""
    monkeypatch.delitem(sys.modules, module, raising=False)  # of another test
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
