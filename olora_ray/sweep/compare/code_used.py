"""The code with which the trainings of a comparison were made: a difference between two of them is of one code only.

<storage>/<name>/code.json    digests of the code and libraries of each attempt that trained something
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator

from olora_ray.common import kept, storage
from olora_ray.sweep.compare.spec import has_begun

logger = logging.getLogger(__name__)

MIXED = (
    "its trainings were made by several versions of olora_ray or of its libraries: a difference between methods may be"
    " one between versions"
)
_FILE = "code.json"
_BEFORE = "of a version that did not note it"


@contextlib.contextmanager
def noted(root: str, trained: Callable[[], int]) -> Iterator[None]:
    """Keep with what is trained in the block, if something is; says so if others before were made with other code.

    `root` is the comparison's folder; what `trained` returns grows with what is.
    """
    known, now, before = _known(root), kept.code(), trained()
    try:
        yield
    finally:
        if now not in known and trained() != before:
            storage.write_text(storage.join(root, _FILE), json.dumps([*known, now]) + "\n")
            if known:
                logger.warning(f"{root}: {MIXED}; choose another run.name to compare with one version")


def notes(root: str) -> tuple[str, ...]:
    """What is to be said beside the results."""
    return (MIXED,) if len(_known(root)) > 1 else ()


def _known(root: str) -> list[str]:
    place = storage.join(root, _FILE)
    if not storage.exists(place):
        return [_BEFORE] if has_begun(root) else []
    try:
        return [str(each) for each in json.loads(storage.read_text(place))]
    except (ValueError, TypeError):
        return [_BEFORE]
