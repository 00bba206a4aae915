"""Hosts of a Ray cluster on one machine: network namespaces on a bridge, each with a Ray node of its own.

The bridge lies in the head's namespace, so all that is made disappears with the namespaces. The hosts share
this machine's filesystem.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.recovery import processes, runs
from tests.recovery.runs import Fault

NETWORK = "10.201.77"
PORT = 6379
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Host:
    """A network namespace, and the Ray node in it."""

    namespace: str
    number: int
    scratch: Path
    fault: Fault

    @property
    def folder(self) -> Path:
        """Ray's folder of this host, whose path marks its processes."""
        return self.scratch / str(self.number)

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def enter(self) -> tuple[str, ...]:
        """Words before a command that is to run on this host."""
        return ("ip", "netns", "exec", self.namespace)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of this host's commands, on top of that of the run."""
        interface = "br0" if self.number == 1 else "eth0"
        return {
            "RAY_AUTH_MODE": "disabled",
            "GLOO_SOCKET_IFNAME": interface,
            "OLORA_TEST_HOST": str(self.folder),
        }

    def start_ray(self) -> None:
        """A Ray node: the head without CPUs, others with one."""
        place = (
            ["--head", f"--port={PORT}", "--num-cpus=0"]
            if self.number == 1
            else [f"--address={head_address()}"]
        )
        rest = [] if self.number == 1 else ["--num-cpus=1"]
        self.ray(
            "start",
            *place,
            *rest,
            f"--node-ip-address={self.address}",
            f"--temp-dir={self.folder}",
            *SMALL,
        )

    def ray(self, *arguments: str) -> None:
        """A command of Ray's on this host."""
        done = subprocess.run(
            [*self.enter, RAY, *arguments],
            env=runs.environment(self.scratch, self.fault) | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    def has(self, pid: int) -> bool:
        """Whether a process runs here."""
        return pid in {process.pid for process in processes.processes_of(self.folder)}

    def raylet(self) -> "psutil.Process | None":
        """The node's own process."""
        for process in processes.processes_of(self.folder):
            if Path((processes.command(process) or [""])[0]).name == "raylet":
                return process
        return None

    def node_id(self) -> str:
        """The node's id in Ray."""
        raylet = self.raylet()
        assert raylet is not None, f"no Ray node on host {self.number}"
        words = processes.command(raylet)
        return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))

    def kill(self) -> None:
        """SIGKILL for all processes of this host at once."""
        processes.kill_all(self.folder)

    def link(self, state: str) -> None:
        """Put the host's cable, at the bridge's end, `up` or `down`."""
        _ip(
            "-n",
            self.namespace.rpartition("-")[0] + "-1",
            "link",
            "set",
            f"port{self.number}",
            state,
        )


SMALL = ("--object-store-memory=150000000", "--disable-usage-stats")


def head_address() -> str:
    return f"{NETWORK}.1:{PORT}"


@contextlib.contextmanager
def hosts(scratch: Path, fault: Fault) -> Iterator[tuple[Host, Host, Host]]:
    """A head and two others, connected; no Ray runs on them yet. Everything is removed on leaving."""
    name = f"olr{os.getpid()}"
    found = tuple(Host(f"{name}-{number}", number, scratch, fault) for number in (1, 2, 3))
    try:
        _connect(found)
        yield found
    finally:
        processes.kill_all(scratch)
        for host in found:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)


def possible() -> bool:
    """Whether this user may make namespaces and bridges here."""
    name = f"olr{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    try:
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
        _ip("-n", name, "link", "add", "port", "type", "veth", "peer", "name", "eth0")
        return True
    except subprocess.CalledProcessError:
        return False
    finally:
        _ip("netns", "del", name)


def _connect(found: tuple[Host, Host, Host]) -> None:
    for host in found:
        _ip("netns", "add", host.namespace)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
    head, *others = found
    _ip("-n", head.namespace, "link", "add", "br0", "type", "bridge")
    _ip("-n", head.namespace, "addr", "add", f"{head.address}/24", "dev", "br0")
    _ip("-n", head.namespace, "link", "set", "br0", "up")
    for host in others:
        port = f"port{host.number}"
        pair = (
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            host.namespace,
        )
        _ip("-n", head.namespace, *pair)
        _ip("-n", head.namespace, "link", "set", port, "master", "br0", "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
