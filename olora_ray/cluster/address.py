"""Which Ray a run uses: that of RAY_ADDRESS, else one that `ray start` has started here, else one of its own.

A Ray that another program has started for itself with ray.init is never joined: it ends with that program. What is
joined is asked first, because ray.init waits for minutes for a Ray that is not there or does not take its token.
"""

import os
import socket
import time
from urllib.parse import urlsplit

import ray

from olora_ray.cluster import ray_internals, token
from olora_ray.common.errors import UserError

PATIENCE = 10.0
"""Seconds that a Ray may take to answer, or one that has just been ended to disappear."""
OWN = "local"
"""What ray.init takes for a Ray of the run's own."""
_VARIABLE = "RAY_ADDRESS"


def find(patience: float = PATIENCE) -> str:
    """The address for ray.init: host:port of a Ray that answers and takes our token, or OWN.

    Raises UserError for an address that is not that of a Ray head, at which nothing answers for `patience`
    seconds, or whose Ray has another version or another token.
    """
    end = time.monotonic() + patience
    while True:
        found = _given() or ray_internals.started_address() or OWN
        if found == OWN or (problem := _silence(found)) is None:
            break
        if time.monotonic() > end:
            raise UserError(_unreachable(found, problem))
        time.sleep(0.5)
    if found != OWN:
        _refuse_other_version(found)
    return found


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
    if given != OWN and None in _parts(given):
        raise UserError(f"{_VARIABLE}={given}: must be HOST:PORT, as 10.0.0.1:6379")
    return given


def _unreachable(found: str, problem: str) -> str:
    if _given():
        return f"{_VARIABLE}={found}: no Ray answers there ({problem}); correct it, or unset it"
    return (
        f"the Ray that was started on this machine does not answer at {found} ({problem}); start it again with"
        f" `ray start --head`, have it forgotten with `ray stop`, or set {_VARIABLE}={OWN} for one of the run's own"
    )


def _refuse_other_version(found: str) -> None:
    try:
        version, _ = token.agreed(found, PATIENCE)
    except ConnectionError as error:
        raise UserError(f"{name(found)}: what answers there is no Ray head ({error})") from None
    except PermissionError as error:
        raise UserError(f"{name(found)}: {error}, or set {_VARIABLE}={OWN} for a Ray of the run's own") from None
    if version not in ("", ray.__version__):
        raise UserError(
            f"{name(found)}: runs Ray {version}, here it is {ray.__version__}: install the same version on all nodes,"
            f" or set {_VARIABLE}={OWN} for a Ray of the run's own"
        )


def name(found: str) -> str:
    """What to call a Ray in messages: how its address became known."""
    return f"{_VARIABLE}={found}" if _given() else f"the Ray that was started on this machine, at {found}"


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
