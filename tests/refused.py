"""What a user can fix is refused, and the message names the place."""

import contextlib
from collections.abc import Iterator

import pytest

from olora_ray.common.errors import UserError


@contextlib.contextmanager
def refused(
    place: str, kind: type[UserError] = UserError
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError whose message has the field, file or argument that is to be changed."""
    with pytest.raises(kind) as caught:
        yield caught
    assert place in str(caught.value)
