"""A real Ray head on loopback that asks for a token, and jobs that are submitted to it as a user does."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests
from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_NOT_OURS = ("MLFLOW_", "RAY_", "HF_TOKEN")
"""Beginnings of variables that a head or a job would act on, if the caller had set them."""


class Head:
    """A head whose environment names `folder`, which is how its processes are found and ended (processes.py)."""

    def __init__(self, folder: Path, nodes: Mapping[str, str], cpus: int = 2) -> None:
        """`folder` has a short path, since sockets lie below it; `nodes` are variables of the nodes, secrets too."""
        self.folder, self.cpus = folder, cpus
        self.port, dashboard = free_port(), free_port()
        self.dashboard, self._dashboard_port = f"http://127.0.0.1:{dashboard}", dashboard
        self.token = secrets.token_hex(32)
        file = folder / "ray_token"
        file.touch(mode=0o600)
        file.write_text(self.token)
        shared = {
            name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)
        }
        shared |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(file),
        }
        self._nodes = {**shared, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **nodes}
        self.submitter = {**shared, "RAY_ADDRESS": self.dashboard}
        """The environment of whoever submits: he has the token, and none of the nodes' secrets."""

    def start(self) -> None:
        """Start it and wait until it takes jobs."""
        command: list[Any] = [BIN / "ray", "start", "--head", f"--port={self.port}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port()}",
        ]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--num-cpus={self.cpus}"]
        command += [f"--temp-dir={self.folder / 'ray'}"]
        done = subprocess.run(
            command, env=self._nodes, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        deadline = time.monotonic() + 120
        while True:  # a head takes jobs some seconds after it has started
            try:
                self.client().submit_job(entrypoint="true")
                return
            except (RuntimeError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def client(self) -> JobSubmissionClient:
        """For calls of this process."""
        return JobSubmissionClient(
            self.dashboard, headers={"Authorization": f"Bearer {self.token}"}
        )

    def jobs(self) -> str:
        """What the dashboard tells of all jobs, to those who have the token."""
        answer = requests.get(
            f"{self.dashboard}/api/jobs/",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
        )
        answer.raise_for_status()
        return answer.text

    def submit(
        self,
        *words: str | Path,
        show: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """`ray job submit --working-dir . -- python WORDS` in the project, to its end; (exit code, output).

        `show` gets each line as it comes; `environment` is that of the submitter, if he is another.
        """
        command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", "python", *words]
        seen = []
        with subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment or self.submitter,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                seen.append(line)
                show(line.rstrip())
        return process.returncode, "".join(seen)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
