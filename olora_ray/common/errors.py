"""Exceptions whose message is for the user, and short messages for other exceptions."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence


class UserError(ValueError):
    """A problem that the user can fix: a wrong config, data, model folder, cluster or address.

    The message names the file, line or field and says what to do. Entry scripts print it as one line and exit with
    `exit_code`. Any other exception is a bug and keeps its traceback.
    """

    exit_code = 2


class Problems(UserError):
    """Several problems under a heading (`my.yaml has 3 problems`). Entry scripts print each on its own line."""

    def __init__(self, heading: str, *problems: str) -> None:
        super().__init__(heading, *problems)
        self.lines = (f"{heading}:", *problems)

    def __str__(self) -> str:
        return f"{self.lines[0]} {'; '.join(self.lines[1:])}"


def of_problems(heading: str, problems: Sequence[str]) -> UserError:
    if len(problems) > 1:
        return Problems(heading, *problems)
    return UserError(*problems)


class TryAgain(UserError):
    """A problem that passes by itself: the same command completes the work later."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h."""


class StoreError(OSError):
    exit_code = 2


class StoreUnavailable(StoreError):
    """An object store does not answer, or asks for a retry later."""

    exit_code = 75


class Stopped(KeyboardInterrupt):
    """The run was asked to stop early.

    Derives from KeyboardInterrupt because `except Exception` in libraries must not swallow it, and because Ray discards
    any other exception that a signal handler raises during ray.get.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TakenOver(Stopped):
    """Another process has taken over this run. This process must not change the run's files any more."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def short_reason(error: BaseException) -> str:
    """Return the operating system's text for an OSError (`No such file or directory`), else the first line."""
    if not isinstance(error, OSError) or not error.strerror:
        return first_line(error)
    if error.errno in _FULL:
        return f"{error.strerror}; make room"
    return error.strerror


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_A_FILE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE})
_OS_ERROR = re.compile(r"\(os error (\d+)\)$")
"""The end of a message of safetensors, which raises its own type for an error of the operating system."""


def of_the_machine(error: BaseException) -> str | None:
    """Return one line for a full disk, or for a file that cannot be read or written; None for any other error."""
    # By its name, because this package needs no Ray.
    if any(each.__name__ == "OutOfDiskError" for each in type(error).__mro__):
        folder = "Ray's temporary folder (ray start --temp-dir)"
        return f"{folder}: its disk is full; make room, and run the same command again"
    if not isinstance(error, OSError):
        match = _OS_ERROR.search(str(error))
        if match:
            number = int(match[1])
            error = OSError(number, os.strerror(number))
    if not isinstance(error, OSError) or error.errno not in _FULL | _OF_A_FILE:
        return None
    if error.errno in _FULL:
        written = error.filename2 or error.filename  # of a copy, `filename` is what was read
        file = f"{written}: " if written else ""
        return f"{file}{error.strerror}; make room, and run the same command again"
    if not error.filename:
        return None
    return f"{error.filename}: {error.strerror}; fix the cause, and run the same command again"


@contextlib.contextmanager
def as_user_error(
    subject: str,
    *types: type[Exception],
    reason: Callable[[BaseException], str] = first_line,
    passes: Callable[[BaseException], bool] = lambda error: isinstance(error, StoreUnavailable),
) -> Iterator[None]:
    """Raise an exception of these types as the UserError `subject: reason`. A UserError is raised unchanged.

    An exception that `passes` by itself, by default an unavailable store, becomes a TryAgain.
    """
    try:
        yield
    except types as error:
        if isinstance(error, UserError):
            raise
        error_type = TryAgain if passes(error) else UserError
        raise error_type(f"{subject}: {reason(error)}") from None
