import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from olora_ray.common.errors import UserError

Script = Callable[[str], ModuleType]


def sets(script: Script, *heldout: tuple[str, str]) -> Any:
    rows = script("row_files")
    train = (rows.Row("One?", "1", "a"), rows.Row("Two?", "2", "b"))
    return rows.Sets(train, tuple(rows.Row(prompt, "3", group) for prompt, group in heldout))


def test_both_files_and_their_digests_are_written(script: Script, tmp_path: Path) -> None:
    digests = script("row_files").write(
        tmp_path / "out", sets(script, ("Drei – 3?", "c")), {"seed": 7}
    )
    assert json.loads((tmp_path / "out" / "heldout.jsonl").read_text("utf-8")) == {
        "prompt": "Drei – 3?",
        "completion": "3",
        "group": "c",
    }
    about = json.loads((tmp_path / "out" / "rows.json").read_text())
    for name, count in (("train.jsonl", 2), ("heldout.jsonl", 1)):
        sha256 = hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        assert digests[name] == sha256
        assert about["files"][name] == {"rows": count, "sha256": sha256}
    assert about["seed"] == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heldout.jsonl",
        "rows.json",
        "train.jsonl",
    ]
    assert (
        script("row_files").write(tmp_path / "out", sets(script, ("Drei – 3?", "c")), {}) == digests
    )


@pytest.mark.parametrize("leak", [("  one?", "c"), ("Four?", "b")])
def test_a_leak_is_never_written(script: Script, tmp_path: Path, leak: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="training and held-out rows share"):
        script("row_files").write(tmp_path, sets(script, leak), {})
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_not_overwritten(script: Script, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*its train\.jsonl was not written by this script"):
        script("row_files").write(tmp_path, sets(script, ("Four?", "d")), {})
    assert (tmp_path / "train.jsonl").read_text() == "mine"
