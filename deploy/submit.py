"""Submit a job to Ray, or follow the running job of this name, and end with the job's own exit code.

    python submit.py [--working-dir DIR] NAME -- COMMAND [ARGUMENT ...]

NAME           the job's submission id. A second submitter of this name follows the job of the first. After the end of
               that job the next one is NAME-2, and so on
--working-dir  a folder to upload, as in `ray job submit`

`ray job submit` cannot follow a running job, and returns 1 for every failure. RAY_ADDRESS, RAY_AUTH_MODE and
RAY_AUTH_TOKEN name the cluster and the token.

SIGTERM stops the job, which gets time for a checkpoint.

Exit codes: the job's own; 2 the token or the request is refused; 75 Ray's dashboard does not answer, or the job was
killed; 143 stopped by SIGTERM.
"""

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shlex
import signal
import time
from pathlib import Path
from types import FrameType

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from olora_ray.common import outcome
from olora_ray.common.errors import Stopped, TryAgain, UserError, first_line
from olora_ray.config import command_line
from olora_ray.tracking import start

STOPPED = 128 + signal.SIGTERM
KILLED = 128 + signal.SIGKILL
STOP_SECONDS = 90
"""Time for a stopped job before Ray kills it, instead of Ray's 3 s."""


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    parsed = command_line.parse(argv[:split], __doc__ or "", options=("--working-dir",))
    if len(parsed.words) != 1 or not argv[split + 1 :]:
        raise UserError("arguments: expected NAME -- COMMAND [ARGUMENT ...]; --help shows how")
    signal.signal(signal.SIGTERM, _stopped)
    address = os.environ.get("RAY_ADDRESS", "not set")
    try:
        code = followed(
            parsed.words[0], shlex.join(argv[split + 1 :]), parsed.options.get("--working-dir")
        )
    except AuthenticationError as error:
        raise UserError(f"RAY_AUTH_TOKEN, for RAY_ADDRESS={address}: {first_line(error)}") from None
    except RuntimeError as error:  # Ray raises this for every answer that is an error
        error_type = TryAgain if "status code 5" in str(error) else UserError
        raise error_type(f"RAY_ADDRESS={address}: {first_line(error)}") from None
    except OSError as error:
        raise TryAgain(
            f"RAY_ADDRESS={address}: Ray's dashboard does not answer: {first_line(error)}"
        ) from None
    raise SystemExit(code)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped("the job was stopped (SIGTERM); run the same command again to resume", STOPPED)


def followed(name: str, entrypoint: str, folder: str | None) -> int:
    client = JobSubmissionClient()
    # Lines of the job's log that begin with this word are for the process that has started this one.
    word = secrets.token_hex(16)
    job = begun(client, name, entrypoint, folder, word)
    try:
        asyncio.run(follow(client, job, word))
        return exit_code(client, job)
    except Stopped:
        stop(client, job)
        raise


def begun(
    client: JobSubmissionClient, name: str, entrypoint: str, folder: str | None, word: str
) -> str:
    # MLflow names LOGNAME as the user of a run; on the cluster that would be the user of Ray.
    variables = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        "LOGNAME": os.environ.get("LOGNAME", ""),
        outcome.VARIABLE: word,
    }
    variables |= {"OLORA_SUBMITTER": start.submitter()}
    if (
        folder
    ):  # otherwise the cluster's own code runs, of which its environment may name the commit
        variables["OLORA_COMMIT"] = start.commit(Path(folder))
    environment = {"env_vars": variables}
    # A submission id can be used once, so a job of this name that has ended gets a successor NAME-2.
    for number in itertools.count(1):
        job = name if number == 1 else f"{name}-{number}"
        if (state := status(client, job)) is None:
            try:
                runtime_env = {**environment, "working_dir": folder} if folder else environment
                client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env)
                print(f"job {job}: submitted", flush=True)
                return job
            except RuntimeError:
                # Another submitter may have been faster; then its job is followed.
                if (state := status(client, job)) is None:
                    raise
        if not state.is_terminal():
            print(f"job {job}: already running; its log follows", flush=True)
            return job
    raise AssertionError


def status(client: JobSubmissionClient, job: str) -> JobStatus | None:
    """Return the job's status; None if there is no job of this id."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


async def follow(client: JobSubmissionClient, job: str, word: str) -> None:
    # The log may end before the job, if the connection breaks; exit_code waits for the job itself.
    with contextlib.suppress(RuntimeError, aiohttp.ClientError):
        async for lines in client.tail_job_logs(job):
            for line in lines.splitlines(keepends=True):
                if line.startswith(f"{word} "):
                    outcome.tell(**json.loads(line.removeprefix(word)))
                else:
                    print(line, end="", flush=True)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """Wait for the job's end and return the exit code of its command; raises TryAgain if it was killed."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(2)
    if info.status in (JobStatus.SUCCEEDED, JobStatus.STOPPED):
        print(f"job {job}: {info.status.lower()}", flush=True)
        return 0 if info.status == JobStatus.SUCCEEDED else STOPPED
    code = info.driver_exit_code
    if code is None or code < 0 or code == KILLED:
        raise TryAgain(
            f"job {job}: killed, without an exit code: {' '.join(str(info.message).split())[:500]}"
        )
    return (
        code  # nothing is printed: the last line of the job's log says why, and night.py tells it
    )


def stop(client: JobSubmissionClient, job: str) -> None:
    print(f"job {job}: stopping", flush=True)
    client.stop_job(job)
    end = time.monotonic() + STOP_SECONDS + 10
    while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
        time.sleep(1)


if __name__ == "__main__":
    command_line.run(main)
