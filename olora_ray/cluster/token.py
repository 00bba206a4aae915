"""Ray's token authentication: a run takes part in it as the Ray asks that it uses, whether RAY_AUTH_MODE is set or not.

Ray 2.60 asks for a token in a Ray that ray.init has started, and in others where RAY_AUTH_MODE=token; later versions
do so everywhere. Its clients send one only if RAY_AUTH_MODE says so, or to a Ray that they have found by themselves.
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Literal

from olora_ray.cluster import ray_internals

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
