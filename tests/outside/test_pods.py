"""deploy/Dockerfile and the pods of deploy/kuberay/rayjob.yaml under podman, as KubeRay 1.7 would start them.

Each pod has an address of its own, and the head a name, as its service has. There is no API server: the test starts and
drains workers in place of the autoscaler, whose container is left out.
"""

import copy
import json
import os
import re
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.test_kuberay import Tree, found_under, rendered
from tests.pipelines import project
from tests.ran import ran
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PROGRAMS = ("podman", "runc", "nft", "mmdebstrap", "kubectl")
NAME = "olora-finetune-a1b2c"
HEAD = f"{NAME}-head-svc.default.svc.cluster.local"
SUBMITTER = "submitter-ray-job-submitter"
STEPS = 4000
CONF = """[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc" # crun refuses control groups in hybrid mode
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile={0}:{0}", "nproc={1}:{1}"]
"""
# A stand-in for python:3.11-slim: Debian from its packages, and the Python of this test.
BASE = """set -e
mmdebstrap --quiet --variant=minbase --include=ca-certificates trixie $1
tar -C $2 --exclude='site-packages/*' --exclude=__pycache__ -c bin/python3.11 include lib | tar -C $1/usr/local -x
chroot $1 ldconfig
chroot $1 python3.11 -m ensurepip >/dev/null 2>&1
ln -s python3.11 $1/usr/local/bin/python
ln -s pip3 $1/usr/local/bin/pip
tar -C $1 -c . >$1.tar
"""


class Podman:
    """Podman with a store and a network of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.namespace = folder, f"olr{os.getpid()}-pods"
        limits = [
            resource.getrlimit(each)[1] for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
        ]
        (folder / "containers.conf").write_text(CONF.format(*limits))
        self.options = [
            "--root",
            folder / "store",
            "--runroot",
            folder / "run",
            "--tmpdir",
            folder / "tmp",
        ]
        self.options += ["--network-config-dir", folder / "networks", "--storage-driver", "overlay"]
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)

    def __call__(self, *words: object, inside: bool = True, check: bool = True) -> str:
        """Run podman in the pods' network or in that of the machine; return its output."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}"] if inside else []
        own = {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }
        command = [str(word) for word in (*enter, "podman", *self.options, *words)]
        done = ran(command, code=None, env={**os.environ, **own})
        assert not check or done.returncode == 0, (
            f"{command}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
        )
        return done.stdout

    def play(self, *documents: Tree, alias: str) -> None:
        file = self.folder / f"{alias}.yaml"
        file.write_text(yaml.safe_dump_all(documents))
        self("kube", "play", "--network", f"pods:alias={alias}", file)

    def end(self) -> None:
        self("pod", "rm", "--all", "--force", "--time", "0")
        subprocess.run(["ip", "netns", "del", self.namespace], check=True)


def build(podman: Podman, image: str) -> None:
    """Build deploy/Dockerfile, with the lock's packages for CPUs."""
    base, context = podman.folder / "base", podman.folder / "context"
    subprocess.run(["bash", "-c", BASE, "base", base, sys.base_prefix], check=True)
    podman("import", "--quiet", f"{base}.tar", "localhost/python:3.11-slim")
    subprocess.run(["git", "clone", "--quiet", ROOT, context], check=True)
    lock = context / "deploy/requirements.lock"
    text = re.sub(r" \\\n(?:    --hash=.*\n)+", "\n", lock.read_text())
    lock.write_text(re.sub(r"(?m)^(?:nvidia-|cuda-|triton==).*\n", "", text))
    # The indexes and certificates of this machine.
    listed = ran([sys.executable, "-m", "pip", "config", "list"])
    found = dict(re.findall(r"(cert|index-url|extra-index-url|find-links)='(.*)'", listed.stdout))
    settings = podman.folder / "pip.conf"
    settings.write_text(
        "[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())
    )
    mounts = [f"{settings}:/etc/pip.conf", "/etc/ssl/certs:/etc/ssl/certs"]
    mounts += [
        f"{folder}:{folder}"
        for folder in [found.get("find-links", "")]
        if Path(folder).is_absolute()
    ]
    words = [word for each in mounts for word in ("--volume", f"{each}:ro")]
    words += ["--pull=never", "--network=host", "--layers=false", "--build-arg", "COMMIT=abc"]
    podman(
        "build",
        *words,
        "--file",
        context / "deploy/Dockerfile",
        "--tag",
        image,
        context,
        inside=False,
    )


def pod(name: str, template: Tree, command: str, options: str = "-c", **variables: str) -> Tree:
    """Return a pod as KubeRay makes it of a template: a command, and variables of Ray."""
    (container,) = template["spec"]["containers"]
    for rest in (
        "resources",
        "lifecycle",
    ):  # podman has no hooks, and the machine's control groups may allow no limits
        container.pop(rest, None)
    token = {
        "name": "RAY_AUTH_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": NAME, "key": "auth_token"}},
    }
    variables |= {"RAY_AUTH_MODE": "token"}
    container |= {"command": ["/bin/bash", options, "--"], "args": [command]}
    container["env"] = [token, *({"name": key, "value": text} for key, text in variables.items())]
    if container["name"] != "ray-job-submitter":
        template["spec"].setdefault("volumes", []).append(
            {"name": "shm", "emptyDir": {"medium": "Memory"}}
        )
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    metadata = {
        "name": name,
        "labels": template["metadata"]["labels"] | {"ray.io/is-ray-node": "yes"},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def node(name: str, group: Tree, address: str = "") -> Tree:
    """Return the pod of a node of Ray, which joins the Ray of an address or is the head, with KubeRay's command."""
    params = {
        "num-cpus": "1",
        "memory": str(4 << 30),
        "dashboard-agent-listen-port": "52365",
    } | group["rayStartParams"]
    words = " ".join(f"--{key}={value}" for key, value in sorted(params.items()))
    role = (
        f"--address={address}:6379" if address else "--head --no-monitor --dashboard-host=0.0.0.0"
    )
    variables = {"RAY_ADDRESS": f"{address or '127.0.0.1'}:6379"}
    made = pod(
        name, group["template"], f"ulimit -n 65536; ray start {role} --block {words}", **variables
    )
    if address:
        (container,) = made["spec"]["containers"]
        wait = f"until ray health-check --address {address}:6379; do sleep 2; done"
        made["spec"]["initContainers"] = [container | {"name": "wait-gcs-ready", "args": [wait]}]
    return made


@pytest.fixture
def podman() -> Iterator[Podman]:
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="olora-pods-", dir="/var/tmp") as folder:
        made = Podman(Path(folder))
        try:
            yield made
        finally:
            made.end()


def test_a_job_grows_leaves_a_drained_pod_and_is_registered(podman: Podman, tmp_path: Path) -> None:
    documents = {
        each["kind"]: each
        for each in rendered(tmp_path, "kuberay")
        if each["kind"] in ("RayJob", "ConfigMap")
    }
    job, environment = documents["RayJob"]["spec"], documents["ConfigMap"]
    (gpu, _), head = (
        job["rayClusterSpec"]["workerGroupSpecs"],
        job["rayClusterSpec"]["headGroupSpec"],
    )
    image = head["template"]["spec"]["containers"][0]["image"]
    build(podman, image)
    listed = json.loads(podman("run", "--rm", "--network=none", image, "pip", "inspect"))[
        "installed"
    ]
    assert {each["metadata"]["name"] for each in listed} > {"ray", "torch", "mlflow", "olora-ray"}
    label = '{{index .Labels "org.opencontainers.image.revision"}}'
    assert podman("image", "inspect", image, "--format", label).strip() == "abc"
    podman("network", "create", "pods")
    podman("volume", "create", "olora-ray-storage")
    storage = Path(
        podman("volume", "inspect", "olora-ray-storage", "--format", "{{.Mountpoint}}").strip()
    )
    # What a user fills in: MLflow's address, and a config; here without GPUs.
    environment["data"]["MLFLOW_TRACKING_URI"] = "sqlite:////storage/mlflow.db"
    project.make_tiny(storage)
    tree = project.settings(
        Path("/storage"), Path("/storage/model"), cluster={"cpus_per_worker": 1}
    )
    tree["train"] |= {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": 200, "log_every": 20}
    (storage / "configs").mkdir()
    project.write_config(storage / "configs", tree, "my_run.yaml")
    subprocess.run(["chown", "-R", "1000", storage], check=True)

    token = {"auth_token": secrets.token_hex(32)}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME}, "stringData": token}
    podman.play(secret, environment, node("head", head), alias=HEAD)
    podman.play(secret, environment, node("first", copy.deepcopy(gpu), HEAD), alias="first")
    # Process 1 of a worker, and the probe that KubeRay makes for this Ray.
    inside = ("exec", "first-ray-worker")
    assert podman(*inside, "id", "-u").strip() == "1000"
    status = podman(*inside, "cat", "/proc/1/status")
    assert re.findall(r"(?m)^(?:NoNewPrivs|CapEff|Seccomp):\s(\w+)", status) == ["0" * 16, "1", "2"]
    probe = "http://localhost:52365/api/healthz"
    until(
        lambda: (
            "success"
            in podman(*inside, "wget", "-q", "-O-", "--tries=20", "--retry-connrefused", probe)
        ),
        60,
    )

    dashboard = f"--address http://{HEAD}:8265"
    entrypoint = job["entrypoint"].replace("cluster.gpus_per_worker=1", "cluster.gpus_per_worker=0")
    healthy = f"until wget -q -O- http://{HEAD}:8265/api/gcs_healthz; do sleep 2; done"
    submit = f"ray job submit {dashboard} --no-wait --submission-id night -- {entrypoint}"
    follow = f"ray job logs {dashboard} --follow night; ray job status {dashboard} night"
    template = job["submitterPodTemplate"]
    podman.play(
        secret,
        pod("submitter", template, f"{healthy}; {submit}; {follow}", "-ce", PYTHONUNBUFFERED="1"),
        alias="submitter",
    )

    def until_told(pattern: str) -> None:
        """Wait for a line of the job's log."""
        seen = [""]

        def told() -> bool:
            running = podman("inspect", SUBMITTER, "--format", "{{.State.Running}}")
            seen[0] = podman("logs", SUBMITTER)
            assert "true" in running, seen[0][-6000:]
            return re.search(pattern, seen[0]) is not None

        until(told, 300, pause=2)

    until_told("step 20/")
    podman.play(secret, environment, node("second", copy.deepcopy(gpu), HEAD), alias="second")
    until_told(r"training continues after step \d+ of \d+ with 2 workers")
    # podman calls no hooks, so the test calls the one that tells Ray of the end of a pod. It ends with the pod.
    (hook,) = found_under(gpu, "preStop")
    podman("exec", "second-ray-worker", *hook["exec"]["command"][:-1], "20", check=False)
    until_told(r"training continues after step \d+ of \d+ with 1 worker; 0 steps done again")
    assert podman("wait", SUBMITTER).strip() == "0"
    log = podman("logs", SUBMITTER)
    assert "registered:           small version 1" in log, log[-6000:]
    assert "Job 'night' succeeded" in log
    assert "registered:           small version 1" in (storage / "logs/finetune.log").read_text()
