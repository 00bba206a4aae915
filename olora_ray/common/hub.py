"""Whether the hub of models and data sets refuses a request, or only does not answer it now."""

from collections.abc import Iterator

TOO_MANY = 429
FIRST_OF_THE_SERVER = 500
"""Statuses of HTTP: too many requests, and the first of those by which a server says that it is not well."""


def is_away(error: BaseException) -> bool:
    """Whether an error of huggingface_hub or datasets passes by itself: no network, no answer, or a server in trouble.

    Not so where this machine is told to stay offline.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    for cause in _chain(error):
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            return status == TOO_MANY or status >= FIRST_OF_THE_SERVER
        # All of the client's own errors but those about an answer are about the way to it. Which client it is changes.
        client: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
        if isinstance(cause, client | ConnectionError | TimeoutError):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those before it, also where `datasets` hides them by raising `from None`."""
    before: BaseException | None = error
    while before is not None:
        yield before
        before = before.__cause__ or before.__context__
