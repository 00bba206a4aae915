"""One line about what happened to a group of workers."""

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from olora_ray.cluster.failures import Failure, SharedBaseDied
from olora_ray.common.errors import StoreUnavailable, TryAgain

GLOO = RuntimeError(
    "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
)


KILLED = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: a25) \
was 23.10GB used / 23.54GB limit (0.981308)
OOM kill reason: Memory usage
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
261\t12.56\tpython other.py
308\t2.15\tray::t
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io."""
"""As Ray 2.60 says it, without some lines."""


def dead() -> Exception:
    return WorkerHealthCheckFailedError("health check failed", failure=RayActorError())


def raised(error: Exception) -> Exception:
    return UserExceptionWithTraceback(
        error, traceback_str=f"Traceback ...\n  line\n{type(error).__name__}: {error}\n"
    )


def preempted() -> Exception:
    return WorkerHealthCheckFailedError(
        "health check failed", failure=RayActorError(preempted=True)
    )


@pytest.mark.parametrize(
    ("error", "expected", "counted"),
    [
        (
            WorkerGroupError("", {0: raised(ValueError("bad row"))}),
            "worker 0 failed (ValueError: bad row)",
            True,
        ),
        (
            WorkerGroupError("", {0: raised(GLOO), 1: raised(ValueError("bad row"))}),
            "worker 1 failed (ValueError: bad row)",
            True,
        ),
        (WorkerGroupError("", {0: raised(GLOO), 1: dead()}), "worker 1 died", True),
        (
            WorkerGroupError("", {2: dead(), 0: raised(GLOO), 1: dead()}),
            "worker 1 and worker 2 died",
            True,
        ),
        (WorkerGroupError("", {}), "workers failed", True),
        (
            WorkerGroupError("", {1: WorkerHealthCheckFailedError("", OutOfMemoryError(KILLED))}),
            "worker 1 failed (Ray killed it because node 10.0.0.2 had only 0.44 of 23.54 GB of memory free; the largest"
            " process there is python other.py (id 261, 12.56 GB); stop it or use less memory)",
            True,
        ),
        (
            WorkerGroupError("", {0: raised(GLOO), 1: preempted()}),
            "worker 1 died with its preempted node",
            False,
        ),
        (RayActorError(), "Train's controller died", True),
        (SharedBaseDied(), "the process that several trials share died", True),
        (ControllerError(RuntimeError("gloo failed to connect")), "gloo failed to connect", True),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), None, False),
    ],
)
def test_the_cause_is_named_and_whether_it_counts(
    error: BaseException, expected: str | None, counted: bool
) -> None:
    assert expected is None or Failure(error).cause == expected
    assert Failure(error).counts is counted


def test_a_store_that_does_not_answer_is_told_apart() -> None:
    away = StoreUnavailable("s3://b/runs: no answer for 60 s")
    assert Failure(WorkerGroupError("", {0: raised(GLOO), 1: raised(away)})).passes
    assert Failure(
        WorkerGroupError("", {0: raised(TryAgain("s3://b/step-3: cannot be read"))})
    ).passes
    assert not Failure(WorkerGroupError("", {0: raised(away), 1: dead()})).passes
    assert not Failure(WorkerGroupError("", {0: raised(ValueError("bad row"))})).passes
