"""The Ray that a run uses: the one at RAY_ADDRESS, else one started here by `ray start`, else one that the run starts.

A run never joins a Ray that another program has started by ray.init, because that Ray ends with its program. Before it
joins a Ray, it asks for an answer itself: ray.init waits for minutes if no Ray answers, or if Ray rejects the token.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from olora_ray.cluster import ray_internals
from olora_ray.common.errors import TryAgain, UserError, as_user_error, first_line
from olora_ray.common.logs import ENVIRONMENT

logger = logging.getLogger(__name__)

# Ray's token authentication. A run always uses the mode of the Ray that it joins, even if RAY_AUTH_MODE is not set.


# Ray's environment variables: the mode of authentication, the token, and the file that has the token.
MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105  # a name
FILE = "RAY_AUTH_TOKEN_PATH"
Mode = Literal["token", "disabled"]


def known() -> str | None:
    """Return this user's token: RAY_AUTH_TOKEN, else the file of RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    token = os.environ.get(TOKEN)
    if token:
        return token.strip()
    try:
        return _file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def agreed(address: str, timeout: float) -> tuple[str, Mode | None]:
    """Return version and authentication mode of the Ray at `address`. With TLS both are unknown: an empty text, None.

    Raises PermissionError, with the remedy, if our token or RAY_AUTH_MODE does not fit, and ConnectionError if no Ray
    head answers.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return "", None  # only ray.init presents the certificates
    our_mode = os.environ.get(MODE, "").lower()
    version = None
    with contextlib.suppress(PermissionError):
        version = ray_internals.version_at(address, None, timeout)
    if version is not None:
        if our_mode == "token":
            raise PermissionError(f"uses no token, but {MODE}=token is set here: unset it")
        return version, "disabled"
    if our_mode == "disabled":
        raise PermissionError(f"requires a token, but {MODE}=disabled is set here: unset it")
    token = known()
    if token is None:
        raise PermissionError(
            f"requires a token, but {_file()} has none: copy the head's token there"
        )
    try:
        return ray_internals.version_at(address, token, timeout), "token"
    except PermissionError:
        source = TOKEN if os.environ.get(TOKEN) else _file()
        raise PermissionError(
            f"rejects the token of {source}: copy the head's token there"
        ) from None


def join(address: str, timeout: float) -> None:
    """Set this process to the authentication mode of the Ray at `address`, before ray.init. Raises like `agreed`."""
    _, mode = agreed(address, timeout)
    if mode is not None:
        ray_internals.set_auth_mode(mode)


def make_own() -> None:
    # ray.init can create a token itself. But two runs that start together then overwrite each other's token, so that
    # each has processes with either token. It also leaves the file readable for other users, and fails if the home
    # directory cannot be written.
    if os.environ.get(MODE, "token").lower() != "token" or known() is not None:
        return
    file = _file()
    token = secrets.token_hex(32)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Its mode is 0600.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".auth_token-") as complete:
            complete.write(token)
            complete.flush()
            with contextlib.suppress(FileExistsError):  # another run was faster: its token is used
                os.link(complete.name, file)
    if known() is None:  # the folder cannot be written, or the file there cannot be read
        os.environ[TOKEN] = token  # for this process and its children


def _file() -> Path:
    path = os.environ.get(FILE)
    return Path(path) if path else Path.home() / ".ray" / "auth_token"


PATIENCE = 10.0
"""Seconds in which a Ray must answer. A Ray that is being stopped disappears within this time."""
OWN = "local"
"""The address with which ray.init starts a new Ray for this run."""
_VARIABLE = "RAY_ADDRESS"
_ANY = ("", "auto")
"""Values of RAY_ADDRESS that mean a Ray on this machine."""
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
NEW_NAME = "PYTORCH_ALLOC_CONF"
SEGMENTS = "expandable_segments:True"
"""Micro-batches differ in length, so fixed segments of a GPU's memory would leave gaps. The user's setting stays."""


def allocator() -> dict[str, str]:
    """Return the setting of torch's memory for the workers: the user's, under either of its names, or ours."""
    # Where both are set, torch takes the older name.
    given = {name: os.environ[name] for name in (ALLOCATOR, NEW_NAME) if name in os.environ}
    return given or {ALLOCATOR: SEGMENTS}


def find(patience: float = PATIENCE) -> str:
    """Return the address for ray.init: host:port of a Ray that answers and accepts our token, or OWN.

    Raises UserError for an address that is no host:port, at which no Ray head answers for `patience` seconds, or whose
    Ray has another version or token.
    """
    end = time.monotonic() + patience
    while True:
        given = _from_environment()
        address = given or ray_internals.started_address() or OWN
        if address == OWN:
            return OWN
        try:
            socket.create_connection(_parts(address), timeout=PATIENCE).close()
            break
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() <= end:
            time.sleep(0.5)
            continue
        if given:
            raise UserError(
                f"{_VARIABLE}={address}: no Ray answers there ({problem}); correct it, or unset it"
            )
        raise UserError(
            f"the Ray that was started on this machine does not answer at {address} ({problem}); restart it with"
            f" `ray start --head`, stop it with `ray stop`, or set {_VARIABLE}={OWN} to start a Ray for this run"
        )
    _refuse_other_version(address, patience)
    return address


def elsewhere() -> bool:
    """True if a run would join a Ray that is running; unlike `find`, do not ask whether it answers."""
    named = os.environ.get(_VARIABLE, "").strip()
    return named not in (*_ANY, OWN) or ray_internals.started_address() is not None


def _from_environment() -> str | None:
    address = os.environ.get(_VARIABLE, "").strip()
    if address in _ANY:
        return None
    if "://" in address:
        raise UserError(
            f"{_VARIABLE}={address}: only `ray job submit` takes such an address; start the run with that, or set"
            f" {_VARIABLE} to the HOST:PORT of the head on a machine of the cluster"
        )
    if address != OWN and None in _parts(address):
        raise UserError(f"{_VARIABLE}={address}: must be HOST:PORT, such as 10.0.0.1:6379")
    return address


def _refuse_other_version(address: str, patience: float) -> None:
    try:
        version, _ = agreed(address, patience)
    except ConnectionError as error:
        raise UserError(
            f"{name(address)}: no Ray head answers there ({error}); correct the address"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"{name(address)}: {error}, or set {_VARIABLE}={OWN} to start a Ray for this run"
        ) from None
    if version not in ("", ray.__version__):
        raise UserError(
            f"{name(address)}: runs Ray {version}, here it is {ray.__version__}: install the same version on all nodes,"
            f" or set {_VARIABLE}={OWN} to start a Ray for this run"
        )


def name(address: str) -> str:
    if _from_environment():
        return f"{_VARIABLE}={address}"
    return f"the Ray started on this machine, at {address}"


def _parts(address: str) -> tuple[str | None, int | None]:
    try:
        split = urlsplit(f"//{address}")
        return split.hostname, split.port
    except ValueError:
        return None, None


# The process of `keep` in a block of `begun`, until `join_or_start` joins its Ray.
_begun: ContextVar["subprocess.Popen[str] | None"] = ContextVar("begun", default=None)


@contextlib.contextmanager
def begun() -> Iterator[None]:
    """Start the Ray that `join_or_start` would start, in a process beside this one, for the time of the block.

    Ray takes five seconds to start, and this process as long for its imports and checks.
    """
    own = False
    with contextlib.suppress(UserError):  # `join_or_start` reports it
        own = find(patience=0) == OWN
    if not own:
        yield
        return
    # In a group of its own: Ctrl+C stops the driver, and the driver stops Ray.
    command = [sys.executable, "-P", "-c", "from olora_ray.cluster import address; address.keep()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0) as process:
        token = _begun.set(process)
        try:
            yield
        finally:
            if _begun.get():  # an error must not wait until Ray stands
                process.kill()
            _begun.reset(token)


def keep() -> None:
    """Start a Ray, print its address, and end it once stdin ends, which the death of the parent process ends too."""
    ray_internals.quiet_ray()
    with contextlib.suppress(Exception):  # the parent tries itself, and reports the error
        _start(logging_level=logging.WARNING)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()


def _start(**settings: Any) -> None:
    make_own()
    # Ray would start one process per CPU beside the driver's imports, which takes the CPU from them and gains nothing.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.update(allocator())
    # The dashboard is ten processes that need six CPU seconds to start, and anyone who reaches its port can run code. A
    # user who wants the dashboard starts Ray before the run.
    # For example, Linux limits the path of a socket to 107 bytes, and a scheduler may set a long TMPDIR.
    failure = "RAY_TMPDIR (or TMPDIR): Ray cannot start there; set a short one, such as /tmp"
    with ray_internals.agents_at_free_ports(), as_user_error(failure, OSError):
        try:
            ray.init(address=OWN, include_dashboard=False, **settings)
        except Exception as error:
            late = isinstance(error, ConnectionError | TimeoutError | RuntimeError)
            # Ray has no other type for a node that does not start in time.
            if not late and type(error) is not Exception:
                raise
            raise TryAgain(
                f"Ray did not start in time on this machine, whose load is {os.getloadavg()[0]:.1f} on"
                f" {os.cpu_count()} CPUs; run the same command again when it is less busy ({first_line(error)})"
            ) from error


def join_or_start() -> bool:
    """Join the Ray that `find` returns, or start one for this run; True in the second case. Raises UserError."""
    target = find()
    own = target == OWN
    shared: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": None}
    if own:
        logger.info("starting Ray")
        begun = _begun.get()
        target = ""
        if begun and begun.stdout:
            target = begun.stdout.readline().strip()
        _begun.set(None)
        if not target:
            _start(**shared)
            return True
    else:
        logger.info(f"connecting to {name(target)}")
        # The environment of a submitted job overrides ours. The processes of an own Ray inherit it, because to make a
        # runtime environment takes Ray a second.
        variables = ENVIRONMENT | allocator()
        shared["runtime_env"] = {"env_vars": ray_internals.beside_job(variables)}
    join(target, PATIENCE)
    # With another Python version, for example, or if this machine is no node.
    failure = f"{name(target)}: cannot connect"
    errors = (ConnectionError, RuntimeError, RayError)
    with as_user_error(failure, *errors, reason=lambda why: " ".join(str(why).split())):
        ray.init(address=target, **shared)
    return own
