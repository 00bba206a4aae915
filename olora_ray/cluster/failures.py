"""Failures of workers, described in one line each."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from olora_ray.cluster import ray_internals
from olora_ray.common.errors import (
    StoreError,
    StoreUnavailable,
    TryAgain,
    UserError,
    of_the_machine,
)

# Parts of the messages of workers that fail because another worker has died. These are consequences, not causes.
CONSEQUENCES = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "timed out waiting",
)
LONGEST = 200


class SharedBaseDied(RayActorError):
    """The process that trains several trials has died, or has not restarted yet."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise the user's error inside a RayTaskError: a UserError, or a TryAgain if the problem may pass by itself."""
    try:
        yield
    except (RayTaskError, OutOfMemoryError) as error:
        cause = getattr(error, "cause", error)
        line = of_the_machine(cause)
        if isinstance(cause, OutOfMemoryError):
            line = f"a process of this run failed: {reason(cause)}"
        if line:
            raise UserError(line) from None
        if isinstance(cause, TryAgain | StoreUnavailable):
            raise TryAgain(str(cause)) from None
        if isinstance(cause, UserError | StoreError):
            raise UserError(str(cause)) from None
        raise  # a bug keeps its traceback


def describe(exceptions: Mapping[int, Exception]) -> str:
    """Return which worker caused the failure, and how: the workers that died, else the first with its own cause."""
    if not exceptions:
        return "workers failed"
    died = [rank for rank, error in exceptions.items() if _death(error)]
    if died:
        shown = " and ".join(f"worker {rank}" for rank in sorted(died))
        if any(getattr(_death(exceptions[rank]), "preempted", False) for rank in died):
            return f"{shown} died with its preempted node"
        return f"{shown} died"
    texts = {rank: reason(error) for rank, error in sorted(exceptions.items())}
    for rank, text in texts.items():
        if not any(part in text.lower() for part in CONSEQUENCES):
            return f"worker {rank} failed ({text})"
    rank = next(iter(texts))
    return f"worker {rank} failed ({texts[rank]})"


@dataclass(frozen=True)
class Failure:
    """The failure of a group of workers."""

    error: BaseException

    @property
    def cause(self) -> str:
        error = self.error
        if isinstance(error, SharedBaseDied):
            return "the process that several trials share died"
        if isinstance(error, RayActorError):
            return "Train's controller died"
        if isinstance(error, WorkerGroupError):
            return describe(error.worker_failures)
        return reason(error)

    @property
    def passes(self) -> bool:
        """True if the failure passes by itself: a store did not answer the worker that caused it."""
        # Ray Train passes on only the text of a worker's exception, so the name of its type is searched there.
        return any(f"{each.__name__}: " in self.cause for each in (StoreUnavailable, TryAgain))

    @property
    def counts(self) -> bool:
        """True if the failure counts against cluster.max_failures. The loss of a preempted node does not."""
        error = self.error
        if isinstance(error, WorkerGroupError):
            failures = error.worker_failures.values()
            return not any(getattr(_death(each), "preempted", False) for each in failures)
        if isinstance(error, ControllerError):
            # Does not count if workers could not start because their node was lost.
            return not ray_internals.startup_failed(error.controller_failure)
        return True


def reason(error: BaseException) -> str:
    """Return type and message of the innermost cause, in one line."""
    while True:
        inner = (
            getattr(error, "health_check_failure", None)
            or getattr(error, "cause", None)
            or error.__cause__
        )
        if not isinstance(inner, BaseException):
            break
        error = inner
    if isinstance(error, OutOfMemoryError):
        return _for_memory(str(error))
    # Ray Train passes on the traceback as text. Its last line is the type and the message.
    text = getattr(error, "_traceback_str", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[-1] if lines else type(error).__name__
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST - 3]}..."
    return shown


_FOR_MEMORY = re.compile(
    r"IP: ([^,]*).*? was (\S+)GB used / (\S+)GB limit.*?COMMAND\n(\d+)\t(\S+)\t([^\n]{1,60})",
    re.DOTALL,
)


def _for_memory(text: str) -> str:
    """Return Ray's text about a process that it has killed for memory, in one line."""
    found = _FOR_MEMORY.search(text)
    if found is None:
        return text.splitlines()[0]
    node, used, limit, process, size, command = found.groups()
    free = float(limit) - float(used)
    return (
        f"Ray killed it because node {node} had only {free:.2f} of {limit} GB of memory free; the largest process there"
        f" is {command} (id {process}, {size} GB); stop it or use less memory"
    )


def _death(error: Exception) -> RayActorError | None:
    inner = getattr(error, "health_check_failure", error)
    return inner if isinstance(inner, RayActorError) else None
