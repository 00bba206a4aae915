"""A world outside on one machine, in which nothing is called localhost: machines, servers with names, TLS and users.

    head, worker1, worker2    machines for Ray: each with its own network, processes, home, /tmp and sshd
    laptop                    a user's machine
    mlflow.internal           MLflow on PostgreSQL: plain HTTP on port 5000, behind nginx with TLS on 443; with users
    s3.internal               SeaweedFS, an S3 server, behind nginx with TLS on 443
    hooks.internal            a receiver of webhooks, on port 8000

A private CA signs the certificates. /mnt is one folder on all machines. A machine is a network, mount, process and
host-name namespace; all of them hang on one bridge, and disappear when the world ends.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.recovery import hosts
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
NETWORK = "10.88.0"
NUMBERS = {"head": 1, "worker1": 2, "worker2": 3, "laptop": 5}
SERVICES = ("mlflow.internal", "s3.internal", "hooks.internal")
SERVER = f"{NETWORK}.100"
USER = "retraining"
PROGRAMS = ("nginx", "sshd", "openssl", "ip", "nsenter", "unshare", "setpriv", "rsync", "curl")
PACKAGES = Path(__file__).with_name("packages")
"""The packages of Debian that have them; prometheus as well for its series."""


def missing() -> str | None:
    """Return why no such world can be made here, or None."""
    if os.geteuid() != 0 or not hosts.possible():
        return "a world outside needs root and network namespaces"
    found = [
        name
        for name in PROGRAMS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    found += [] if (BIN / "weed").exists() else ["weed"]
    found += [] if _postgres() else ["postgresql"]
    return (
        f"a world outside needs {', '.join(found)}: apt-get install $(cat {PACKAGES})"
        if found
        else None
    )


def _postgres() -> Path | None:
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None)


@dataclass
class Machine:
    """A machine, and what is done on it as its user root."""

    name: str
    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """The machine's first process, its sshd, as the test's own machine counts."""
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return int(children[0])

    def command(self, words: str, **variables: str) -> list[str]:
        """The words before a bash command that runs on this machine, with these variables and no others."""
        own = {
            "HOME": "/root",
            "USER": "root",
            "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **variables,
        }
        inside = ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", "env", "-i"]
        return [
            *inside,
            *(f"{name}={value}" for name, value in own.items()),
            "bash",
            "-c",
            f"cd ~ && {words}",
        ]

    def run(
        self, words: str, timeout: float = 600, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a bash command to its end; its output has both streams."""
        return subprocess.run(
            self.command(words, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, words: str, timeout: float = 600, **variables: str) -> str:
        """Run a bash command that must succeed; returns its output."""
        done = self.run(words, timeout, **variables)
        assert done.returncode == 0, (
            f"{self.name}: {words}\nexit code {done.returncode}\n{done.stdout[-6000:]}"
        )
        return done.stdout

    def start(self, words: str, log: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a bash command; its output goes to the file `log` in the machine's folder."""
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                self.command(words, **variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """End the machine with all of its processes at once, as a power failure does."""
        self.process.kill()
        self.process.wait()


@dataclass
class World:
    """The machines and servers; made by `world`."""

    folder: Path
    name: str
    password: str = field(default_factory=lambda: secrets.token_hex(12))
    machines: dict[str, Machine] = field(default_factory=dict)
    heard: list[dict[str, Any]] = field(default_factory=list)
    """What the receiver of webhooks has got, the oldest first."""
    _servers: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _database_password: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def ca(self) -> Path:
        """The file with the certificates of all CAs, on all machines."""
        return Path("/mnt/ca-bundle.crt")

    @property
    def shared(self) -> Path:
        """The folder that is /mnt on all machines; they have it under this path too."""
        return self.folder / "shared"

    @property
    def tls(self) -> dict[str, str]:
        """The variables of a node for MLflow and S3 behind TLS."""
        return {
            "SSL_CERT_FILE": str(self.ca),
            "MLFLOW_TRACKING_URI": "https://mlflow.internal",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "AWS_ENDPOINT_URL": "https://s3.internal",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": self.password,
        }

    # Machines.

    def machine(self, name: str) -> Machine:
        """Switch a machine on; one that was killed comes back with its disk."""
        words = ["ip", "netns", "exec", self._namespace(name)]
        words += ["unshare", "-m", "-u", "-p", "-f", "--mount-proc", "--kill-child"]
        words += ["bash", str(Path(__file__).with_name("machine.sh"))]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        words += [name, str(folder), str(self.shared), str(self.folder / "hosts"), str(ROOT)]
        with (folder / "machine.log").open(
            "wb"
        ) as log:  # empty, so that a second start is not taken for ready at once
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.machines[name] = found = Machine(name, folder, process)
        until(
            lambda: "Server listening" in (folder / "machine.log").read_text(errors="replace"), 30
        )
        return found

    def keys(self) -> None:
        """Let root of all machines reach all machines by ssh without a password."""
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")],
            check=True,
        )
        for machine in self.machines.values():
            ssh = machine.folder / "root" / ".ssh"
            shutil.copy(self.folder / "key", ssh / "id_ed25519")
            shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
            (ssh / "config").write_text("Host *\n  StrictHostKeyChecking no\n  LogLevel ERROR\n")
            (ssh / "id_ed25519").chmod(0o600)

    # Servers.

    def start_server(self, name: str, words: str, ready: str, **variables: str) -> None:
        """Start a server beside the machines, and wait until `ready` (a bash command) succeeds."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._servers[name] = subprocess.Popen(
                [*self._beside, "bash", "-c", f"exec {words}"],
                cwd=self.folder,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        quiet = subprocess.DEVNULL

        def answers() -> bool:
            done = subprocess.run(
                [*self._beside, "bash", "-c", ready], stdout=quiet, stderr=quiet, check=False
            )
            assert self._servers[name].poll() is None, (self.folder / f"{name}.log").read_text()[
                -3000:
            ]
            return done.returncode == 0

        until(answers, 120, pause=0.5)

    def stop_server(self, name: str) -> None:
        """End a server and its processes."""
        process = self._servers.pop(name)
        for number in (
            signal.SIGINT,
            signal.SIGKILL,
        ):  # PostgreSQL waits for its clients after SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    def database(self) -> None:
        """Start PostgreSQL; its data stay when it is stopped."""
        found = _postgres()
        assert found is not None
        data = self.folder / "postgres"
        as_postgres = "setpriv --reuid=postgres --regid=postgres --clear-groups"
        if first := not data.exists():
            data.mkdir()
            shutil.chown(data, "postgres", "postgres")
            (self.folder / "pw").write_text(self._database_password)
            init = f"{found}/initdb -D {data} -U mlflow --pwfile={self.folder}/pw -A scram-sha-256 -E UTF8"
            subprocess.run(
                f"{as_postgres} {init}", shell=True, check=True, capture_output=True, cwd=data
            )
        words = f"{as_postgres} {found}/postgres -D {data} -h 127.0.0.1 -p 5544 -k {data}"
        self.start_server("database", words, f"{found}/pg_isready -h 127.0.0.1 -p 5544")
        if first:
            for made in ("mlflow", "users"):
                self.sql(f"create database {made}")

    def sql(self, statement: str) -> None:
        """Run a statement as PostgreSQL's administrator."""
        address = f"postgresql://mlflow:{self._database_password}@127.0.0.1:5544/postgres"
        words = [*self._beside, f"{_postgres()}/psql", address, "-c", statement]
        subprocess.run(words, check=True, capture_output=True)

    def mlflow(self) -> None:
        """Start MLflow on PostgreSQL, with users."""
        database = f"postgresql://mlflow:{self._database_password}@127.0.0.1:5544"
        (self.folder / "users.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}/users\nadmin_username = {USER}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
        )
        words = f"{BIN}/mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 1"
        words += f" --allowed-hosts 'mlflow.internal,mlflow.internal:*' --backend-store-uri {database}/mlflow"
        words += f" --artifacts-destination {self.folder}/artifacts"
        self.start_server(
            "mlflow",
            words,
            "[ $(curl -s -o /dev/null -w '%{http_code}' http://mlflow.internal:5000/health) = 200 ]",
            MLFLOW_AUTH_CONFIG_PATH=str(self.folder / "users.ini"),
            MLFLOW_AUTH_ADMIN_PASSWORD=self.password,
            MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(),
        )

    def store(self) -> None:
        """Start SeaweedFS with one user, and make the bucket."""
        allowed = [f"{verb}" for verb in ("Admin", "Read", "Write", "List", "Tagging")]
        user = {
            "name": USER,
            "credentials": [{"accessKey": USER, "secretKey": self.password}],
            "actions": allowed,
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [user]}))
        (self.folder / "weed").mkdir(exist_ok=True)
        words = f"{BIN}/weed server -dir={self.folder}/weed -ip=127.0.0.1 -ip.bind=127.0.0.1 "
        words += f"-master.volumeSizeLimitMB=256 -volume.max=20 -s3 -s3.port=8333 -s3.config={self.folder}/s3.json"
        self.start_server("store", words, "exec 3<>/dev/tcp/127.0.0.1/8333")

    def nginx(self, limit: str = "4g") -> None:
        """Start nginx with TLS before MLflow and the store; `limit` is the largest upload."""
        place = self.folder / "nginx"
        place.mkdir(exist_ok=True)
        sites = "".join(
            f"server {{ listen {SERVER}:443 ssl; server_name {name}; ssl_certificate {self.folder}/server.crt;"
            f" ssl_certificate_key {self.folder}/server.key; location / {{ proxy_pass http://127.0.0.1:{port};"
            " proxy_set_header Host $http_host; proxy_http_version 1.1; proxy_read_timeout 300s; } }\n"
            for name, port in (("mlflow.internal", 5000), ("s3.internal", 8333))
        )
        (place / "nginx.conf").write_text(
            f"daemon off; user root; worker_processes 1; pid {place}/pid; error_log {place}/error.log;\n"
            "events { worker_connections 256; }\n"
            f"http {{ access_log {place}/access.log; client_max_body_size {limit};"
            f" proxy_request_buffering off;\n{sites}}}\n"
        )
        ready = f"exec 3<>/dev/tcp/{SERVER}/443"
        self.start_server("nginx", f"/usr/sbin/nginx -p {place} -c {place}/nginx.conf", ready)

    def certificates(self) -> None:
        """Make a private CA and the servers' certificate, and /mnt/ca-bundle.crt with the CA in it."""
        names = ",".join(f"DNS:{name}" for name in SERVICES)
        (self.folder / "names").write_text(f"subjectAltName={names}")
        for words in (
            'req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 30 -subj "/CN=A private CA"'
            " -addext keyUsage=critical,keyCertSign",
            'req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj "/CN=mlflow.internal"',
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile names -out server.crt",
        ):
            subprocess.run(
                ["openssl", *shlex.split(words)], cwd=self.folder, check=True, capture_output=True
            )
        system = Path("/etc/ssl/certs/ca-certificates.crt")
        bundle = system.read_text() if system.exists() else ""
        (self.shared / "ca-bundle.crt").write_text(bundle + (self.folder / "ca.crt").read_text())

    @contextlib.contextmanager
    def receiver(self) -> Iterator[None]:
        """Receive webhooks at http://hooks.internal:8000 for the block; `heard` has what came."""
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        made: list[ThreadingHTTPServer] = []

        def listen() -> None:  # a thread may enter a network namespace by itself
            with open(f"/run/netns/{self._namespace('beside')}") as namespace:
                _enter(namespace.fileno())
            server = ThreadingHTTPServer((SERVER, 8000), Handler)
            made.append(server)
            server.serve_forever(poll_interval=0.1)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        until(lambda: made, 10)
        try:
            yield
        finally:
            made[0].shutdown()
            thread.join()

    # The network.

    def network(self) -> None:
        """Make the namespaces, the bridge, and a file of names."""
        lines = [
            "127.0.0.1 localhost",
            *(f"{NETWORK}.{number} {name}" for name, number in NUMBERS.items()),
        ]
        lines += [f"{SERVER} {' '.join(SERVICES)}", ""]
        (self.folder / "hosts").write_text("\n".join(lines))
        beside = self._namespace("beside")
        own = Path("/etc/netns") / beside  # `ip netns exec` lays it over /etc
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "hosts", own / "hosts")
        _ip("netns", "add", beside)
        _ip("-n", beside, "link", "set", "lo", "up")
        _ip("-n", beside, "link", "add", "br0", "type", "bridge")
        _ip("-n", beside, "addr", "add", f"{SERVER}/24", "dev", "br0")
        _ip("-n", beside, "link", "set", "br0", "up")
        for name, number in NUMBERS.items():
            there = self._namespace(name)
            _ip("netns", "add", there)
            _ip("-n", there, "link", "set", "lo", "up")
            _ip(
                "-n",
                beside,
                "link",
                "add",
                f"p{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                there,
            )
            _ip("-n", beside, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", there, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            _ip("-n", there, "link", "set", "eth0", "up")

    def end(self) -> None:
        """Remove everything."""
        for name in reversed(list(self._servers)):
            self.stop_server(name)
        for machine in self.machines.values():
            machine.kill()
        for name in ("beside", *NUMBERS):
            subprocess.run(
                ["ip", "netns", "del", self._namespace(name)], check=False, capture_output=True
            )
        shutil.rmtree(Path("/etc/netns") / self._namespace("beside"), ignore_errors=True)
        time.sleep(0.5)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _beside(self) -> list[str]:
        return ["ip", "netns", "exec", self._namespace("beside")]

    def _namespace(self, name: str) -> str:
        return f"{self.name}-{name}"


@contextlib.contextmanager
def world(*machines: str, servers: bool = True) -> Iterator[World]:
    """Make a world with these machines and all servers, for the block."""
    folder = Path(
        tempfile.mkdtemp(prefix="olora-outside-", dir="/var/tmp")
    )  # PostgreSQL's user must reach it
    folder.chmod(0o755)
    (folder / "shared").mkdir()
    made = World(folder, f"olr{os.getpid()}")
    try:
        made.network()
        if servers:
            made.certificates()
            made.database()
            made.mlflow()
            made.store()
            made.nginx()
        for name in machines:
            made.machine(name)
        made.keys()
        with made.receiver():
            yield made
    finally:
        made.end()


def _enter(namespace: int) -> None:
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).setns(namespace, 0) == 0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
