"""Which Ray a run uses: that of RAY_ADDRESS, else one that `ray start` has started here, else one of its own.

A Ray that another program has started for itself with ray.init is never joined: it ends with that program. What is
joined is asked first, because ray.init waits for minutes for a Ray that is not there or does not take its token.
"""

import contextlib
import os
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import ray

from olora_ray.cluster import ray_internals
from olora_ray.common.errors import UserError

# Ray's token authentication: a run takes part in it as the Ray asks that it uses, whether RAY_AUTH_MODE is set or
# not.


MODE, TOKEN, FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's variables: whether there are tokens, the token itself, the file that has it."""
Mode = Literal["token", "disabled"]


def known() -> str | None:
    """The token of this user: RAY_AUTH_TOKEN, else the file of RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    if given := os.environ.get(TOKEN):
        return given.strip()
    try:
        return _file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def agreed(address: str, timeout: float) -> tuple[str, Mode | None]:
    """Version of the Ray at `address`, and the mode of authentication that it wants; None if it was not asked.

    Raises PermissionError, with what to do, if our token or RAY_AUTH_MODE does not go with it, and ConnectionError
    if no Ray head answers.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return "", None  # with certificates of its own, which ray.init presents
    wished = os.environ.get(MODE, "").lower()
    try:
        version = ray_internals.version_at(address, None, timeout)
    except PermissionError:
        return _with_token(address, wished, timeout), "token"
    if wished == "token":
        raise PermissionError(f"asks for no token, and {MODE}=token is set here: unset it")
    return version, "disabled"


def _with_token(address: str, wished: str, timeout: float) -> str:
    """The version of a Ray that asks for a token."""
    if wished == "disabled":
        raise PermissionError(f"asks for a token, and {MODE}=disabled is set here: unset it")
    ours = known()
    if ours is None:
        raise PermissionError(f"asks for a token, and there is none in {_file()}: copy the head's there")
    try:
        return ray_internals.version_at(address, ours, timeout)
    except PermissionError:
        where = TOKEN if os.environ.get(TOKEN) else _file()
        raise PermissionError(f"does not take the token of {where}: copy the head's there") from None


def join(address: str, timeout: float) -> None:
    """Let this process authenticate as the Ray at `address` wants it; before ray.init. Raises as `agreed`."""
    _, mode = agreed(address, timeout)
    if mode is not None:
        ray_internals.set_auth_mode(mode)


def make_own() -> None:
    """See to it that there is a token, before ray.init starts a Ray with it.

    ray.init makes one itself, but two at the same time overwrite each other's, and each then has processes with
    either; it also leaves the file readable for others, and fails where the home directory cannot be written.
    """
    if os.environ.get(MODE, "token").lower() != "token" or known() is not None:
        return
    file, token = _file(), secrets.token_hex(32)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".auth_token-") as whole:  # mode 0600
            whole.write(token)
            whole.flush()
            with contextlib.suppress(FileExistsError):  # another run was faster: its token is used
                os.link(whole.name, file)
    except OSError:
        pass
    if known() is None:  # the folder cannot be written, or the file there not be read
        os.environ[TOKEN] = token  # of this process and those that it starts


def _file() -> Path:
    given = os.environ.get(FILE)
    return Path(given) if given else Path.home() / ".ray" / "auth_token"


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
        _refuse_other_version(found, patience)
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


def _refuse_other_version(found: str, patience: float) -> None:
    try:
        version, _ = agreed(found, patience)
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
