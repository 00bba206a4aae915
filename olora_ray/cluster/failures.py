"""Failures of a group of workers, each in one line; told to the driver from Train's controller."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, PreemptionError, UserCallback, WorkerGroupError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Failure
from olora_ray.common.errors import StoreError, StoreUnavailable, TryAgain, UserError, of_the_machine

# What the other workers report when one has died: consequences, not causes.
CONSEQUENCES = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "timed out waiting")
LONGEST = 200


class SharedBaseDied(RayActorError):
    """The process that several trials share has died, or is not there again yet."""


class TellDriver(UserCallback):
    """Sends each failure of a group of workers over the channel."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in the controller, before it decides what to do."""
        self.channel.send.remote(Failure(describe(worker_exceptions)))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise what a Ray task has raised for a person, not wrapped: UserError, or TryAgain for what may pass."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if line := of_the_machine(cause):
            raise UserError(line) from None
        if isinstance(cause, TryAgain | StoreUnavailable):
            raise TryAgain(str(cause)) from None
        if isinstance(cause, UserError | StoreError):
            raise UserError(str(cause)) from None
        raise  # a bug


def describe(exceptions: Mapping[int, Exception]) -> str:
    """The worker (rank) to blame and what happened to it: one that died, else the first with a cause of its own."""
    if not exceptions:
        return "workers failed"
    died = [rank for rank, error in exceptions.items() if _death(error)]
    if died:
        shown = " and ".join(f"worker {rank}" for rank in sorted(died))
        preempted = any(getattr(_death(exceptions[rank]), "preempted", False) for rank in died)
        return f"{shown} died" + (" with its preempted node" if preempted else "")
    texts = {rank: reason(error) for rank, error in sorted(exceptions.items())}
    own = [rank for rank, text in texts.items() if not any(part in text.lower() for part in CONSEQUENCES)]
    rank = own[0] if own else next(iter(texts))
    return f"worker {rank} failed ({texts[rank]})"


def cause(error: BaseException) -> str:
    """Why training ended with this error of Train, in one line."""
    if isinstance(error, SharedBaseDied):
        return "the process of several trials died"
    if isinstance(error, RayActorError):
        return "Train's controller died"
    if isinstance(error, WorkerGroupError):
        return describe(error.worker_failures)
    if isinstance(error, PreemptionError):
        return "workers were preempted"
    return reason(error)


def passes(error: BaseException) -> bool:
    """Whether it passes by itself: a store did not answer the worker to blame. Train hands on no more than its text."""
    return any(f"{kind.__name__}: " in cause(error) for kind in (StoreUnavailable, TryAgain))


def counts(error: BaseException) -> bool:
    """Whether an error counts against cluster.max_failures: preempted nodes do not."""
    if isinstance(error, WorkerGroupError):
        return not any(_death(e) and getattr(_death(e), "preempted", False) for e in error.worker_failures.values())
    if isinstance(error, ControllerError):  # workers could not start: their node was gone by then
        return not ray_internals.startup_failed(error.controller_failure)
    return not isinstance(error, PreemptionError)


def reason(error: BaseException) -> str:
    """The innermost cause's type and message, in one line."""
    while True:
        inner = getattr(error, "health_check_failure", None) or getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    # Train hands on the traceback as text: its last line says what it was.
    text = getattr(error, "_traceback_str", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[-1] if lines else type(error).__name__
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def _death(error: Exception) -> RayActorError | None:
    inner = getattr(error, "health_check_failure", error)
    return inner if isinstance(inner, RayActorError) else None
