"""Two runs that start at the same time on an empty storage."""

import subprocess
import sys
from pathlib import Path

CODE = "import sys; from olora_ray.tracking.client import check_uri; sys.stdin.readline(); check_uri(sys.argv[1])"


def test_a_new_database_can_be_opened_by_several_processes_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", CODE, uri]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [(process.communicate()[1][-2000:], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith("mlflow.db")]
