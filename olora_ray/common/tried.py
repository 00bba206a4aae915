"""The versions of other programs with which this project's tests have passed, from the oldest to the newest.

The project relies on what these programs do, also where they promise nothing. A version outside the range is named in
one line of the log and used. Only `olora-ray follow` refuses an engine that is older than the oldest.
"""

import logging
import re
from functools import cache

logger = logging.getLogger(__name__)

# docs/generated/versions.md for Ray and MLflow, tests/serving for the engines. SGLang was a stand-in with its calls.
TRIED = {
    "Ray": ("2.58", "2.60"),
    "MLflow": ("3.12", "3.17"),
    "vLLM": ("0.29", "0.32"),
    "SGLang": ("0.5.10", "0.5.10"),
}


@cache
def tell(program: str, version: str) -> None:
    """Log one line for a version that was not tried."""
    oldest, newest = TRIED[program]
    # Later releases of 2.60, such as 2.60.1, count as 2.60.
    number = _numbers(version)[: len(_numbers(newest))]
    if not _numbers(oldest) <= number <= _numbers(newest):
        logger.warning(f"{program} {version}: {shown(program)} with this project")


def shown(program: str) -> str:
    oldest, newest = TRIED[program]
    if oldest == newest:
        return f"{oldest} was tried"
    return f"{oldest} to {newest} were tried"


def is_older(version: str, than: str) -> bool:
    """True if the release `version` came before `than`; False for a build from source."""
    return "dev" not in version and _numbers(version) < _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", version.partition("+")[0])[:3])
