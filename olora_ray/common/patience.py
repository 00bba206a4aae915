"""Patience with an object store that has answered before: failed requests are repeated for a while, with a line each.

A store that has never answered in this process is not waited for: what is wrong there is wrong from the start.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from pyarrow import ArrowException

from olora_ray.common.connections import TRUST, UNTRUSTED
from olora_ray.common.errors import StoreError, StoreUnavailable, first_line
from olora_ray.common.secrets import mask

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
PATIENCE = 60.0
"""Seconds after the first failure in which a request is repeated."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|HTTP status 5(?!07)\d\d"  # 507: the store is full
    r"|cloud::Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED):"  # gs://
)
_answered: set[str] = set()


def passes(error: BaseException) -> bool:
    """True if the failure passes by itself: no answer, or one that asks to come again."""
    if UNTRUSTED.search(str(error)):
        return False
    return (
        isinstance(error, StoreUnavailable | TimeoutError | ConnectionError) or _PASSING.search(str(error)) is not None
    )


def patiently(store: str, request: Callable[[], Found]) -> Found:
    """What `request` returns; repeats it for PATIENCE seconds if the store, which has answered before, fails.

    Raises FileNotFoundError where nothing is there, ValueError for what is no address, and StoreError or
    StoreUnavailable for all else: not all that pyarrow raises for gs:// is an OSError.
    """
    end, number = None, 0
    while True:
        try:
            found = request()
        except FileNotFoundError:
            _answered.add(store)
            raise
        except (OSError, ArrowException) as error:
            if isinstance(error, ValueError):  # what is no address
                raise
            end = time.monotonic() + PATIENCE if end is None else end
            left = end - time.monotonic()
            if store not in _answered or not passes(error) or left <= 0:
                kind = StoreUnavailable if passes(error) else StoreError
                untrusted = UNTRUSTED.search(str(error))
                raise kind(f"{mask(store)}: {TRUST}" if untrusted else mask(first_line(error))) from None
            logger.warning(f"{mask(store)} does not answer ({first_line(error)}); asked again for {left:.0f} s more")
            time.sleep(min(PAUSES[min(number, len(PAUSES) - 1)], left))
            number += 1
        else:
            _answered.add(store)
            return found
