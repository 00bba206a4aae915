"""The one exception that is meant for a person."""


class UserError(ValueError):
    """Something the user can fix: bad config, data, model folder, cluster or address.

    The message names the file, line or field and says what to do. Entry scripts print it as
    one line and exit with a code other than 0; everything else is a bug and keeps its traceback.
    """
