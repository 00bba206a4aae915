"""The same script as a job on a running head that asks for a token."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.pipelines import project

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265
ADDRESS = f"http://127.0.0.1:{DASHBOARD}"
TOKEN = secrets.token_hex(32)
CANARY = "c4n4ryOfTheNode"
"""A hub token in the environment of the nodes."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head on loopback; yields the environment for its commands."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir(mode=0o700)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    # Unix sockets lie below it, and their paths must be short.
    temporary = Path("/tmp") / f"olora-head-{os.getpid()}"
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "HF_TOKEN": CANARY,
        "RAY_ADDRESS": f"127.0.0.1:{PORT}",  # Train's clean-up asks this instance
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    starting = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    command: list[Any] = [BIN / "ray", "start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={temporary}"]
    subprocess.run(command, env=starting, check=True, capture_output=True, timeout=120)
    environment["RAY_ADDRESS"] = ADDRESS
    wait_for_agent()
    yield environment
    subprocess.run([BIN / "ray", "stop", "--force"], env=starting, check=False, capture_output=True, timeout=60)
    subprocess.run(["rm", "-rf", temporary], check=False)


def client() -> JobSubmissionClient:
    """For calls of this process, which has another home."""
    return JobSubmissionClient(ADDRESS, headers={"Authorization": f"Bearer {TOKEN}"})


def wait_for_agent() -> None:
    """A head takes jobs some seconds after it has started."""
    for attempt in range(120):
        try:
            client().submit_job(entrypoint="true")
            return
        except (RuntimeError, ConnectionError):
            if attempt == 119:
                raise
            time.sleep(0.5)


def submit(head: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of the main script from the repository's root, waiting for its end."""
    command: list[Any] = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", "python", "pipelines/finetune.py"]
    return subprocess.run(
        [*command, *arguments], cwd=project.ROOT, env=head, capture_output=True, text=True, timeout=300, check=False
    )


def live_actors(head: dict[str, str]) -> list[str]:
    listing = subprocess.run(
        [BIN / "ray", "list", "actors", "--filter", "state=ALIVE", "--format", "json"],
        env=head,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # Ray Data keeps this one for the cluster, whatever runs.
    return [
        name for actor in json.loads(listing.stdout) if (name := actor["class_name"]) != "_AutoscalingCoordinatorActor"
    ]


def test_a_job_succeeds_and_leaves_no_actor(head: dict[str, str], tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    done = submit(head, str(file), "train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert (corpus / "runs" / "small" / "result.json").is_file()
    assert live_actors(head) == []
    # The node's secrets are there for the job, and not in what the dashboard tells of it.
    answer = requests.get(f"{ADDRESS}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    assert str(file) in answer.text
    assert not any(secret in answer.text + done.stdout + done.stderr for secret in (CANARY, TOKEN))


def test_nobody_submits_a_job_without_the_token(head: dict[str, str], tmp_path: Path) -> None:
    asked = requests.get(f"{ADDRESS}/api/jobs/", timeout=10)
    assert asked.status_code == 401
    with_wrong = {**head, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    without = {**head, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    for environment, problem in ((with_wrong, "403"), (without, "401")):
        done = submit(environment, "--help")
        assert done.returncode == 1
        assert problem in done.stdout + done.stderr or "uthenticat" in done.stdout + done.stderr


def test_a_broken_config_fails_the_job_with_one_line(head: dict[str, str], tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    done = submit(head, str(file), "adapter.rnk=8")
    assert done.returncode == 1
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    # Once as the last line of the log, and once more where `ray job submit` says why the job failed.
    assert set(lines) == {f"error: {file}: adapter.rnk: unknown field; did you mean adapter.rank?"}
    newest = max(client().list_jobs(), key=lambda job: job.start_time or 0)
    assert newest.status == JobStatus.FAILED
    assert "Traceback" not in done.stdout + done.stderr
    assert not (corpus / "runs").exists()


def test_a_stopped_job_leaves_no_actor(head: dict[str, str], tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model, train__steps=100_000))
    jobs = client()
    job = jobs.submit_job(
        entrypoint=f"python pipelines/finetune.py {file}",
        runtime_env={"working_dir": str(project.ROOT), "excludes": [".venv", ".git", "runs"]},
    )
    wait_for(lambda: "step 2/100000" in jobs.get_job_logs(job))
    assert live_actors(head) != []
    jobs.stop_job(job)
    wait_for(lambda: jobs.get_job_status(job) == JobStatus.STOPPED)
    wait_for(lambda: live_actors(head) == [])


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.5)
