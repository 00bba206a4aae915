"""Address of the Ray that a run uses, checked first: ray.init waits almost three minutes for an unreachable one."""

import os
import socket
import time
from urllib.parse import urlsplit

from olora_ray.cluster import ray_internals
from olora_ray.common.errors import UserError

PATIENCE = 10.0
"""Seconds that a Ray may take to answer, or one that has just been ended to disappear."""
_VARIABLE = "RAY_ADDRESS"


def find(patience: float = PATIENCE) -> str:
    """The address for ray.init: host:port of a Ray that answers, or "local" for one of the run's own.

    RAY_ADDRESS comes first, then the Ray that runs on this machine. Raises UserError for an address that is
    not that of a Ray head, or at which nothing answers for `patience` seconds.
    """
    end = time.monotonic() + patience
    while True:
        found = _given() or ray_internals.running_address() or "local"
        if found == "local" or (problem := _silence(found)) is None:
            return found
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    if _given():
        raise UserError(f"{_VARIABLE}={found}: no Ray answers there ({problem}); correct it, or unset it")
    raise UserError(
        f"the Ray of this machine does not answer at {found} ({problem}); "
        "start it again with `ray start --head`, or have it forgotten with `ray stop`"
    )


def _given() -> str | None:
    """RAY_ADDRESS, unless it only says to look on this machine."""
    given = os.environ.get(_VARIABLE, "").strip()
    if given in ("", "auto"):
        return None
    if "://" in given:
        raise UserError(
            f"{_VARIABLE}={given}: that is for `ray job submit`; start the run with it, or set {_VARIABLE} to the "
            "HOST:PORT of the head on a machine of the cluster"
        )
    if given != "local" and None in _parts(given):
        raise UserError(f"{_VARIABLE}={given}: must be HOST:PORT, as 10.0.0.1:6379")
    return given


def _silence(address: str) -> str | None:
    """Why no connection can be made, or None if one can."""
    try:
        with socket.create_connection(_parts(address), timeout=PATIENCE):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _parts(address: str) -> tuple[str | None, int | None]:
    """Host and port, each None if it is not there."""
    try:
        split = urlsplit(f"//{address}")
        return split.hostname, split.port
    except ValueError:
        return None, None
