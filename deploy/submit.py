"""Submit a job to Ray, or follow the one of this name that still runs, and end with the job's own exit code.

    python submit.py NAME -- COMMAND [ARGUMENT ...]

NAME is the job's submission id: a submitter that was evicted finds the job that it began, and does not begin a
second one. Once that has ended, the next is NAME-2, and so on. `ray job submit` knows neither, and returns 1 for
every failure. Where the cluster is and its token are in RAY_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN, as for that.
"""

import asyncio
import itertools
import shlex
import sys
import time

from ray.job_submission import JobStatus, JobSubmissionClient

STOPPED = 143


def main(argv: list[str]) -> int:
    """Submit or follow, to the end; returns the exit code."""
    if len(argv) < 3 or argv[1] != "--":
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    client = JobSubmissionClient()
    job = begun(client, argv[0], shlex.join(argv[2:]))
    asyncio.run(follow(client, job))
    return exit_code(client, job)


def begun(client: JobSubmissionClient, name: str, entrypoint: str) -> str:
    """The id of the job of this name that runs; submitted, if none does."""
    for number in itertools.count(1):
        job = name if number == 1 else f"{name}-{number}"
        if (found := status(client, job)) is None:
            try:
                client.submit_job(entrypoint=entrypoint, submission_id=job)
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
    """Print the job's log until it ends."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """The exit code of the job's command, once it has ended; the log may end a little before."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(2)
    print(f"job {job}: {info.status.lower()}", flush=True)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return STOPPED if info.status == JobStatus.STOPPED else info.driver_exit_code or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
