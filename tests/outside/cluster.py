"""A cluster of Ray in a world outside, made and used by the commands of docs/cluster.md and docs/operations.md."""

import re
import subprocess
from pathlib import Path

import yaml

from tests.outside.world import ROOT, USER, Machine, World
from tests.waiting import until

JOBS = "export RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:8265 PYTHONUNBUFFERED=1"
NODES = 3
SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)


def check_out(machine: Machine, folder: str) -> None:
    """A checkout of the project on a machine, with the environment of this test."""
    machine.ok(f"git clone -q {ROOT} {folder} && ln -s {ROOT}/.venv {folder}/.venv")


def write_settings(world: World, folder: Path) -> None:
    """Edit cluster.yaml and deploy/cluster.env in the laptop's checkout, as their comments say for standing machines.

    The nodes get the packages of this test's environment instead of the lock's.
    """
    text = (folder / "cluster.yaml").read_text()
    tree = yaml.safe_load(text)
    lines = "\n".join(re.findall("^#   ((?:provider|auth): .*)", text, re.MULTILINE))
    for told, name in {
        "HEAD": "head",
        "WORKER_1": "worker1",
        "WORKER_2": "worker2",
        "ubuntu": "root",
    }.items():
        lines = lines.replace(told, name)
    (gone,) = re.findall(r"^# and delete ([^.]*)\.", text, re.MULTILINE)
    for name in re.split(r", | and ", gone):
        del tree[name]
    tree |= yaml.safe_load(lines)
    for own in re.findall(r"^  # (~/\S+): ~/\S+$", text, re.MULTILINE):  # the files with passwords
        tree["file_mounts"][own] = own
    tree["setup_commands"] = [tree["setup_commands"][0], f"ln -sfn {ROOT}/.venv ~/olora_env"]
    (folder / "cluster.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    variables = folder / "deploy" / "cluster.env"
    wanted = {name: value for name, value in world.tls.items() if name not in SECRETS}
    wanted |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    variables.write_text(
        variables.read_text() + "".join(f"{name}={text}\n" for name, text in wanted.items())
    )
    home = folder.parent
    user, password = USER, world.password
    for place, content in {
        ".mlflow/credentials": f"[mlflow]\nmlflow_tracking_username = {user}\nmlflow_tracking_password = {password}\n",
        ".aws/credentials": f"[default]\naws_access_key_id = {user}\naws_secret_access_key = {password}\n",
    }.items():
        (home / place).parent.mkdir(mode=0o700, exist_ok=True)
        (home / place).write_text(content)
        (home / place).chmod(0o600)


def bring_up(world: World) -> None:
    """`ray up` from the laptop, and the tunnel to the dashboard."""
    laptop = world.machines["laptop"]
    check_out(laptop, "olora_ray")
    write_settings(world, laptop.folder / "root" / "olora_ray")
    laptop.ok("cd olora_ray && .venv/bin/ray get-auth-token --generate")
    laptop.ok("cd olora_ray && RAY_UP_enable_autoscaler_v2=0 .venv/bin/ray up -y cluster.yaml")
    until(lambda: nodes(world) == NODES, 240, pause=5)
    laptop.start("cd olora_ray && .venv/bin/ray dashboard cluster.yaml", "tunnel.log")
    until(lambda: laptop.run("exec 3<>/dev/tcp/127.0.0.1/8265").returncode == 0, 60, pause=1)


def nodes(world: World) -> int:
    """How many nodes of the cluster live."""
    listed = world.machines["head"].run(
        f"{JOBS} && ray list nodes --filter state=ALIVE --format json", timeout=60
    )
    return listed.stdout.count('"node_id"')


def submit(
    machine: Machine, *words: str, folder: str = "olora_ray"
) -> "tuple[subprocess.Popen[bytes], Path]":
    """`ray job submit` from a checkout on a machine; returns the process and the file that its output goes to."""
    log = machine.folder / f"job-{len(list(machine.folder.glob('job-*')))}.log"
    line = f"cd {folder} && {JOBS} && .venv/bin/ray job submit --working-dir . -- python {' '.join(words)}"
    return machine.start(line, log.name), log


def submitted(
    machine: Machine, *words: str, folder: str = "olora_ray", timeout: float = 600
) -> str:
    """`ray job submit` to its end, which must be a success; returns the output."""
    process, log = submit(machine, *words, folder=folder)
    code = process.wait(timeout)
    assert code == 0, log.read_text()[-6000:]
    return log.read_text()


def pids(machine: Machine, title: str) -> list[str]:
    """The processes on a machine whose command line has this word, as the machine counts them."""
    return machine.run(f"pgrep -f '[{title[0]}]{title[1:]}'").stdout.split()
