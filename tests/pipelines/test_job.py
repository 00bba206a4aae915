"""The same script as a job on a running head that asks for a token."""

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobStatus

from tests.pipelines import project
from tests.ray_head import BIN, Head
from tests.recovery.processes import scratch
from tests.waiting import until

pytestmark = pytest.mark.ray
SCRIPT = "pipelines/finetune.py"
CANARY = "c4n4ryOfTheNode"
"""A hub token in the environment of the nodes."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with scratch() as folder:
        started = Head(folder, {"HF_TOKEN": CANARY})
        started.start()
        yield started


def live_actors(head: Head) -> list[str]:
    listing = subprocess.run(
        [BIN / "ray", "list", "actors", "--filter", "state=ALIVE", "--format", "json"],
        env=head.submitter,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # Ray Data keeps this one for the cluster, whatever runs.
    return [
        name for actor in json.loads(listing.stdout) if (name := actor["class_name"]) != "_AutoscalingCoordinatorActor"
    ]


def test_a_job_succeeds_and_leaves_no_actor(head: Head, tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    code, log = head.submit(SCRIPT, file, "train.steps=2")
    assert code == 0, log
    assert "succeeded" in log
    assert (corpus / "runs" / "small" / "result.json").is_file()
    assert live_actors(head) == []
    # The node's secrets are there for the job, and not in what the dashboard tells of it.
    jobs = head.jobs()
    assert str(file) in jobs
    assert not any(secret in jobs + log for secret in (CANARY, head.token))


def test_nobody_submits_a_job_without_the_token(head: Head, tmp_path: Path) -> None:
    asked = requests.get(f"{head.dashboard}/api/jobs/", timeout=10)
    assert asked.status_code == 401
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    for change, problem in (({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "403"), ({"RAY_AUTH_MODE": "disabled"}, "401")):
        code, log = head.submit(SCRIPT, "--help", environment={**head.submitter, **change})
        assert code == 1
        assert problem in log or "uthenticat" in log


def test_a_broken_config_fails_the_job_with_one_line(head: Head, tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    code, log = head.submit(SCRIPT, file, "adapter.rnk=8")
    assert code == 1
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    # Once as the last line of the log, and once more where `ray job submit` says why the job failed.
    assert set(lines) == {f"error: {file}: adapter.rnk: unknown field; did you mean adapter.rank?"}
    newest = max(head.client().list_jobs(), key=lambda job: job.start_time or 0)
    assert newest.status == JobStatus.FAILED
    assert "Traceback" not in log
    assert not (corpus / "runs").exists()


@pytest.mark.slow
def test_a_submitter_follows_the_job_of_its_name_and_ends_as_that_does(head: Head, tmp_path: Path) -> None:
    go = tmp_path / "go"
    words = ["bash", "-c", f"echo began; until [ -e {go} ]; do sleep 0.1; done; exit 75"]
    command = [sys.executable, project.ROOT / "deploy" / "submit.py", "night", "--", *words]

    @contextlib.contextmanager
    def submitter() -> "Iterator[subprocess.Popen[str]]":
        with subprocess.Popen(command, env=head.submitter, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                go.touch()  # a test that fails does not wait for a job that waits for it

    with submitter() as first:
        assert first_lines(first) == ["job night: submitted\n", "began\n"]
        with submitter() as second:  # the first was evicted, say
            assert first_lines(second) == ["job night: runs already, its log follows\n", "began\n"]
            go.touch()
            assert (first.wait(60), second.wait(60)) == (75, 75)
    with submitter() as third:  # after an end there is another job
        assert third.stdout
        assert third.stdout.read().splitlines()[0] == "job night-2: submitted"
        assert third.wait(60) == 75
    found = {job.submission_id for job in head.client().list_jobs() if str(job.submission_id).startswith("night")}
    assert found == {"night", "night-2"}


def first_lines(submitter: "subprocess.Popen[str]") -> list[str]:
    """Its first two, without what Ray writes into each job's log."""
    assert submitter.stdout
    rays = ("Runtime env is setting up", "Running entrypoint for job")
    lines = (line for line in submitter.stdout if not any(text in line for text in rays))
    return [next(lines), next(lines)]


@pytest.mark.slow
def test_a_stopped_job_leaves_no_actor(head: Head, tiny_model: Path, corpus: Path) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model, train__steps=100_000))
    jobs = head.client()
    job = jobs.submit_job(
        entrypoint=f"python pipelines/finetune.py {file}",
        runtime_env={"working_dir": str(project.ROOT), "excludes": [".venv", ".git", "runs"]},
    )
    until(lambda: "step 2/100000" in jobs.get_job_logs(job), 120, pause=0.5)
    assert live_actors(head) != []
    jobs.stop_job(job)
    until(lambda: jobs.get_job_status(job) == JobStatus.STOPPED, 120, pause=0.5)
    until(lambda: live_actors(head) == [], 120, pause=0.5)
