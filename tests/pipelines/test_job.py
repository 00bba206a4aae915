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
from tests.ran import ran
from tests.ray_head import BIN, Head
from tests.recovery.processes import scratch
from tests.waiting import until

pytestmark = pytest.mark.ray
SCRIPT = "pipelines/finetune.py"
SUBMIT = project.ROOT / "deploy" / "submit.py"
CANARY = "c4n4ryOfTheNode"
"""A hub token in the environment of the nodes."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with scratch() as folder:
        started = Head(folder, {"HF_TOKEN": CANARY})
        started.start()
        yield started


def live_actors(head: Head) -> list[str]:
    listing = ran(
        [BIN / "ray", "list", "actors", "--filter", "state=ALIVE", "--format", "json"],
        env=head.submitter,
    )
    # Ray Data keeps this one for the cluster, whatever runs.
    return [
        name
        for actor in json.loads(listing.stdout)
        if (name := actor["class_name"]) != "_AutoscalingCoordinatorActor"
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
    code, log = head.submit(
        SCRIPT, "--help", environment={**head.submitter, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    )
    assert code == 1
    assert "403" in log or "uthenticat" in log


@pytest.mark.slow
def test_a_submitter_follows_the_job_of_its_name_and_ends_as_that_does(
    head: Head, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    words = ["bash", "-c", f"echo began; until [ -e {go} ]; do sleep 0.1; done; exit 75"]
    command = [sys.executable, SUBMIT, "night", "--", *words]

    @contextlib.contextmanager
    def submitter() -> "Iterator[subprocess.Popen[str]]":
        with subprocess.Popen(
            command, env=head.submitter, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                go.touch()  # a test that fails does not wait for a job that waits for it

    with submitter() as first:
        assert first_lines(first) == ["job night: submitted\n", "began\n"]
        with submitter() as second:  # the first was evicted, say
            assert first_lines(second) == [
                "job night: already running; its log follows\n",
                "began\n",
            ]
            go.touch()
            assert (first.wait(60), second.wait(60)) == (75, 75)
    with submitter() as third:  # after an end there is another job
        assert third.stdout.read().splitlines()[0] == "job night-2: submitted"
        assert third.wait(60) == 75
    found = {
        job.submission_id
        for job in head.client().list_jobs()
        if str(job.submission_id).startswith("night")
    }
    assert found == {"night", "night-2"}


def first_lines(submitter: "subprocess.Popen[str]") -> list[str]:
    """Its first two, without what Ray writes into each job's log."""
    assert submitter.stdout
    rays = ("Runtime env is setting up", "Running entrypoint for job")
    lines = (line for line in submitter.stdout if not any(text in line for text in rays))
    return [next(lines), next(lines)]


@pytest.mark.slow
def test_a_submitter_that_is_stopped_stops_its_job_which_has_time_for_a_checkpoint(
    head: Head, tmp_path: Path
) -> None:
    (tmp_path / "here").touch()
    script = "trap 'sleep 5; ls; exit 0' TERM; echo began; while true; do sleep 0.1; done"  # longer than Ray's 3 s
    command = [
        sys.executable,
        SUBMIT,
        "--working-dir",
        tmp_path,
        "stopped",
        "--",
        "bash",
        "-c",
        script,
    ]
    with subprocess.Popen(
        command, env=head.submitter, stdout=subprocess.PIPE, text=True
    ) as process:
        assert first_lines(process) == ["job stopped: submitted\n", "began\n"]
        process.terminate()
        assert process.wait(60) == 143
    jobs = head.client()
    assert jobs.get_job_status("stopped") == JobStatus.STOPPED
    assert jobs.get_job_logs("stopped").splitlines()[-1] == "here"


@pytest.mark.slow
def test_the_limit_of_a_night_stops_its_job_on_the_cluster(head: Head, tmp_path: Path) -> None:
    night = [
        sys.executable,
        project.ROOT / "deploy" / "night.py",
        "--hours",
        "0.005",
        tmp_path / "no_config.yaml",
    ]
    command = [*night, "--", sys.executable, SUBMIT, "limited", "--", "sleep", "600"]
    done = ran(command, code=75, env=head.submitter)
    assert "NOT FINISHED: stopped after 0.005 hours" in done.stdout
    assert head.client().get_job_status("limited") == JobStatus.STOPPED


def submit(environment: dict[str, str], name: str, *words: str) -> tuple[int, list[str]]:
    """(exit code, lines on stderr)."""
    done = ran([sys.executable, SUBMIT, name, "--", *words], code=None, env=environment)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.slow
def test_a_submitter_says_later_for_a_job_that_was_killed_and_for_a_head_that_is_not_there(
    head: Head,
) -> None:
    code, lines = submit(head.submitter, "killed", "bash", "-c", "kill -9 $$")
    assert code == 75
    assert lines[-1].startswith("error: job killed: killed, without an exit code: ")
    code, lines = submit({**head.submitter, "RAY_ADDRESS": "http://127.0.0.1:1"}, "night", "true")
    assert (code, len(lines)) == (75, 1)
    assert lines[0].startswith(
        "error: RAY_ADDRESS=http://127.0.0.1:1: Ray's dashboard does not answer: "
    )


@pytest.mark.slow
def test_a_submitter_with_a_wrong_token_is_a_mistake(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    code, lines = submit({**head.submitter, "RAY_AUTH_TOKEN_PATH": str(wrong)}, "night", "true")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: RAY_AUTH_TOKEN, for RAY_ADDRESS={head.dashboard}: ")
    code, lines = submit(head.submitter, "night")
    assert (code, lines) == (
        2,
        ["error: arguments: expected NAME -- COMMAND [ARGUMENT ...]; --help shows how"],
    )


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
