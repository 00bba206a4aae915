"""The same script as a job on a running head that asks for a token."""

import contextlib
import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobStatus

from tests.pipeline.test_connection import connected, environment
from tests.pipelines import project
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


@pytest.mark.slow  # in make test, with a stand-in for the head: tests/cluster/test_token.py
def test_a_head_with_a_token_is_joined_or_refused_in_one_line(head: Head) -> None:
    there = {**environment(head.folder), "RAY_ADDRESS": f"127.0.0.1:{head.port}"}
    done = connected({**there, "RAY_AUTH_TOKEN_PATH": str(head.folder / "ray_token")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        rf"^own \S+:{head.port} True$", done.stdout, re.MULTILINE
    )  # Ray may name 127.0.0.1 otherwise
    for change, problem in (
        ({}, "requires a token, but "),
        ({"RAY_AUTH_TOKEN": "another"}, "rejects the token of RAY_AUTH_TOKEN"),
    ):
        refused = connected({**there, **change})
        assert refused.returncode == 2, refused.stdout + refused.stderr
        [line] = refused.stderr.splitlines()
        assert line.startswith(f"error: RAY_ADDRESS=127.0.0.1:{head.port}: ")
        assert problem in line
        assert head.token not in line


@pytest.mark.slow  # in make test, without a job: tests/config/test_command_line.py
def test_a_broken_config_fails_the_job_with_one_line(
    head: Head, tiny_model: Path, corpus: Path
) -> None:
    file = project.write_config(corpus, project.settings(corpus, tiny_model))
    code, log = head.submit(SCRIPT, file, "adapter.rnk=8")
    assert code == 1
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    # Once as the last line of the log, and once more where `ray job submit` says why the job failed.
    assert set(lines) == {f"error: {file}: adapter.rnk: unknown field; did you mean adapter.rank?"}
    newest = max(head.client().list_jobs(), key=lambda job: job.start_time or 0)
    assert newest.status == JobStatus.FAILED
    assert "Traceback" not in log
    assert not (corpus / "runs" / "small").exists()


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
        assert third.stdout
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
    done = subprocess.run(
        command, env=head.submitter, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "NOT FINISHED: stopped after 0.005 hours" in done.stdout
    assert head.client().get_job_status("limited") == JobStatus.STOPPED


def submit(environment: dict[str, str], name: str, *words: str) -> tuple[int, list[str]]:
    """(exit code, lines on stderr)."""
    done = subprocess.run(
        [sys.executable, SUBMIT, name, "--", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
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
