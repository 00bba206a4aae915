"""Exceptions that are meant for a person, and the words of those that are not."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence


class UserError(ValueError):
    """Something the user can fix: bad config, data, model folder, cluster or address.

    The message names the file, line or field and says what to do. Entry scripts print it as
    one line and exit with a code other than 0; everything else is a bug and keeps its traceback.
    """

    exit_code = 2


class Problems(UserError):
    """Several problems of one thing (`my.yaml has 3 problems`): an entry script prints each in a line of its own."""

    def __init__(self, heading: str, *problems: str) -> None:
        super().__init__(heading, *problems)
        self.lines = (f"{heading}:", *problems)

    def __str__(self) -> str:
        return f"{self.lines[0]} {'; '.join(self.lines[1:])}"


def of_problems(heading: str, problems: Sequence[str]) -> UserError:
    """The error of one problem, or of several under a heading."""
    return Problems(heading, *problems) if len(problems) > 1 else UserError(*problems)


class TryAgain(UserError):
    """Something that passes by itself: the same command finishes the work later."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h."""


class StoreError(OSError):
    """An object store refuses a request or fails; says in one line which and why. Entry scripts print that line."""

    exit_code = 2


class StoreUnavailable(StoreError):
    """An object store does not answer, or asks to come again later."""

    exit_code = 75


class Stopped(KeyboardInterrupt):
    """The run was asked to end before its end.

    Derives from KeyboardInterrupt: `except Exception` in libraries must not swallow it, and Ray discards anything
    else that a signal handler raises during ray.get.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TakenOver(Stopped):
    """Another process does this work now: what it writes to is to be left as it is."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def short_reason(error: BaseException) -> str:
    """The operating system's words for an OSError (`No such file or directory`), else the first line."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_A_PLACE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE})
_TOLD = re.compile(r"\(os error (\d+)\)$")
"""The end of safetensors' messages, whose exception is no OSError."""


def of_the_machine(error: BaseException) -> str | None:
    """One line for an OSError that is nobody's bug: a full disk, or a file that may or can not be written or read."""
    if not isinstance(error, OSError) and (told := _TOLD.search(str(error))):
        error = OSError(int(told[1]), os.strerror(int(told[1])))
    if not isinstance(error, OSError) or error.errno not in _FULL | _OF_A_PLACE:
        return None
    if error.errno in _FULL:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; make room, and run the same command again"
    if not error.filename:
        return None
    return f"{error.filename}: {error.strerror}; mend that, and run the same command again"


def _store_is_away(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable)


@contextlib.contextmanager
def as_user_error(
    what: str,
    *kinds: type[Exception],
    reason: Callable[[BaseException], str] = first_line,
    passes: Callable[[BaseException], bool] = _store_is_away,
) -> Iterator[None]:
    """Raise an exception of these kinds as the UserError `what: reason`; a UserError passes as it is.

    One that `passes` by itself, by default a store that does not answer now, gives TryAgain.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError):
            raise
        kind = TryAgain if passes(error) else UserError
        raise kind(f"{what}: {reason(error)}") from None
