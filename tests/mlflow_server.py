"""A real MLflow server for tests, which can be killed and started again."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import requests

from tests import mlflow_database
from tests.waiting import until


class Server:
    """A real `mlflow server` over SQLite, on one port whatever happens to it."""

    def __init__(self, folder: Path, auth: tuple[str, str] | None = None) -> None:
        """`auth` is (user, password) of its administrator: it then refuses everybody else."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        # A Python with another version of MLflow (tools/try_versions.py).
        other = os.environ.get("OLORA_TEST_MLFLOW")
        self.command = [
            other or sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        self.command += ["--artifacts-destination", str(folder / "artifacts")]
        folder.mkdir(parents=True, exist_ok=True)
        if not other:
            mlflow_database.place(folder)
        # MLflow's own jobs are eight more processes, which import MLflow each, and nothing here asks for them.
        self.environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if auth:
            self.command += ["--app-name", "basic-auth"]
            self.environment |= _guarded(folder, *auth)
        self.start()

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=quiet, stderr=quiet, start_new_session=True
        )

    def wait(self) -> None:
        until(self.answers, 180, pause=0.1)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _guarded(folder: Path, user: str, password: str) -> dict[str, str]:
    """The variables of a server with users; on disk there is no password but its hash."""
    settings = folder / "basic_auth.ini"
    database = f"sqlite:///{folder}/auth.db"
    check = "mlflow.server.auth:authenticate_request_basic_auth"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = {user}\n"
        f"authorization_function = {check}\nauth_cache_ttl_seconds = 60\n"  # a hash costs 0.1 s a request
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
    }
