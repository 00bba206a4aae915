"""Submit a job to Ray, or follow the one of this name that still runs, and end with the job's own exit code.

    python submit.py [--working-dir DIR] NAME -- COMMAND [ARGUMENT ...]

NAME is the job's submission id: a second submitter of this name follows the job of the first. Once that has ended, the
next is NAME-2, and so on. `ray job submit` knows neither, and returns 1 for every failure. --working-dir is uploaded,
as there; RAY_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN say where the cluster is, with which token.

SIGTERM stops the job, which has time for a checkpoint, and gives exit code 143. Exit code 75: Ray's dashboard does not
answer, or the job was killed. 2: the token or the request is refused.
"""

import asyncio
import contextlib
import itertools
import os
import shlex
import signal
import time
from types import FrameType

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from olora_ray.common.errors import Stopped, TryAgain, UserError, first_line
from olora_ray.config import command_line

STOPPED = 128 + signal.SIGTERM
KILLED = 128 + signal.SIGKILL
STOP_SECONDS = 90
"""Time for a job that is stopped, before Ray kills it; by default that is 3 s."""


def main(argv: list[str]) -> None:
    """Submit or follow, and exit with the job's code."""
    split = argv.index("--") if "--" in argv else len(argv)
    found = command_line.parse(argv[:split], __doc__ or "", options=("--working-dir",))
    if len(found.words) != 1 or not argv[split + 1 :]:
        raise UserError("arguments: expected NAME -- COMMAND [ARGUMENT ...]; --help shows how")
    signal.signal(signal.SIGTERM, _stopped)
    address = os.environ.get("RAY_ADDRESS", "not set")
    try:
        code = followed(found.words[0], shlex.join(argv[split + 1 :]), found.options.get("--working-dir"))
    except AuthenticationError as error:
        raise UserError(f"RAY_AUTH_TOKEN, for RAY_ADDRESS={address}: {first_line(error)}") from None
    except RuntimeError as error:  # Ray's word for each answer that is an error
        kind = TryAgain if "status code 5" in str(error) else UserError
        raise kind(f"RAY_ADDRESS={address}: {first_line(error)}") from None
    except OSError as error:
        raise TryAgain(f"RAY_ADDRESS={address}: Ray's dashboard does not answer: {first_line(error)}") from None
    raise SystemExit(code)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped("the job is stopped (SIGTERM); the same command continues with what is done", STOPPED)


def followed(name: str, entrypoint: str, folder: str | None) -> int:
    """The exit code of the job, after its end; a job that this process is told to stop is stopped."""
    client = JobSubmissionClient()
    job = begun(client, name, entrypoint, folder)
    try:
        asyncio.run(follow(client, job))
        return exit_code(client, job)
    except Stopped:
        stop(client, job)
        raise


def begun(client: JobSubmissionClient, name: str, entrypoint: str, folder: str | None) -> str:
    """The id of the job of this name that runs; submitted, if none does."""
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    for number in itertools.count(1):
        job = name if number == 1 else f"{name}-{number}"
        if (found := status(client, job)) is None:
            try:
                runtime_env = {**environment, "working_dir": folder} if folder else environment
                client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env)
                print(f"job {job}: submitted", flush=True)
                return job
            except RuntimeError:
                if (found := status(client, job)) is None:
                    raise
        if not found.is_terminal():
            print(f"job {job}: runs already, its log follows", flush=True)
            return job
    raise AssertionError


def status(client: JobSubmissionClient, job: str) -> JobStatus | None:
    """None if there is no job of this id."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the job's log until it ends, or the connection does: the job's status tells which."""
    with contextlib.suppress(RuntimeError, aiohttp.ClientError):
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """The exit code of the job's command, once it has ended; the log may end before. Raises TryAgain if killed."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(2)
    print(f"job {job}: {info.status.lower()}", flush=True)
    if info.status in (JobStatus.SUCCEEDED, JobStatus.STOPPED):
        return 0 if info.status == JobStatus.SUCCEEDED else STOPPED
    code = info.driver_exit_code
    if code is None or code < 0 or code == KILLED:
        raise TryAgain(f"job {job}: killed, with no exit code of its own: {' '.join(str(info.message).split())[:500]}")
    return code


def stop(client: JobSubmissionClient, job: str) -> None:
    """Stop the job, and wait for its end."""
    print(f"job {job}: is being stopped", flush=True)
    client.stop_job(job)
    end = time.monotonic() + STOP_SECONDS + 10
    while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
        time.sleep(1)


if __name__ == "__main__":
    command_line.run(main)
