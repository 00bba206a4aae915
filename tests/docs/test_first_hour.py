"""The commands of docs/first-hour.md, as a new user gives them: in an empty folder with one file of rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_the_commands_of_the_page_lead_to_an_answer_and_a_version(tmp_path: Path) -> None:
    rows = (
        (ROOT / "pipelines" / "quickstart" / "train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines(keepends=True)
    )
    (tmp_path / "chats.jsonl").write_text("".join(rows[:240]), encoding="utf-8")
    commands = re.findall(
        r"^    \$ (.+)$",
        (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(commands) == 5
    assert commands[0].startswith("pip install")  # tests/test_wheel.py installs a wheel
    path, said = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", ""
    for command in commands[1:]:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    for part in (
        "messages rows in jsonl",
        "registering",
        "base:",
        "fine-tuned:",
        '{"category": ',
        "candidate",
    ):
        assert part in said, said[-3000:]
