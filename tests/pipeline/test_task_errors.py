"""What a Ray task raises for a person is one line with the exit code that it has without Ray."""

import errno
import os

import pytest
from ray.exceptions import RayTaskError

from olora_ray.cluster.failures import user_errors
from olora_ray.common.errors import StoreError, StoreUnavailable, UserError
from tests.refused import refused


def raised_by_a_task(error: Exception) -> Exception:
    """What `ray.get` raises then."""
    wrapped = RayTaskError(
        "f", f"Traceback (most recent call last):\n{error!r}", error, "ray::f", 1, "127.0.0.1"
    )
    return wrapped.as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("data.train: broken"), 2),
        (StoreError("s3://b/a: AccessDenied"), 2),
        (StoreUnavailable("s3://b/a: no answer"), 75),
    ],
)
def test_the_line_and_the_exit_code_are_those_of_the_task(error: Exception, code: int) -> None:
    """Else a store that was away during an export would end a night for good, with a remote traceback as its line."""
    with pytest.raises(UserError) as caught, user_errors():
        raise raised_by_a_task(error)
    assert (str(caught.value), caught.value.exit_code) == (str(error), code)
    assert not isinstance(caught.value, RayTaskError)


def test_a_full_disk_of_a_node_is_one_line() -> None:
    with (
        refused("/runs/tokens/a"),
        user_errors(),
    ):
        raise raised_by_a_task(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/tokens/a"))


def test_a_bug_of_a_task_stays_one() -> None:
    with pytest.raises(RayTaskError), user_errors():
        raise raised_by_a_task(KeyError("ours"))
