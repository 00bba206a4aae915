"""The exceptions that are meant for a person."""


class UserError(ValueError):
    """Something the user can fix: bad config, data, model folder, cluster or address.

    The message names the file, line or field and says what to do. Entry scripts print it as
    one line and exit with a code other than 0; everything else is a bug and keeps its traceback.
    """

    exit_code = 2


class TryAgain(UserError):
    """Something that passes by itself: the same command finishes the work later."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h."""


class Stopped(KeyboardInterrupt):
    """The run was asked to end before its end.

    No Exception, so that no library takes it for an error; and a KeyboardInterrupt, since Ray drops whatever
    else a signal's handler raises while the main thread waits in ray.get.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
