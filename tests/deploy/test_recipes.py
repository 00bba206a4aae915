"""The files that the recipes copy and call exist."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.scripts import scripts

from olora_ray.config.load import parse_assignments
from tests.ran import ran

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGE = "/opt/olora_ray/"
"""The folder of the project in the image."""


def dockerfile() -> list[list[str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Return (file, words) of each command that a manifest or the crontab runs."""
    for file in sorted((DEPLOY / "kuberay").glob("*job.yaml")):
        spec = yaml.safe_load(file.read_text())["spec"]
        spec = spec.get("jobTemplate", spec)
        if "entrypoint" in spec:
            yield file.name, shlex.split(spec["entrypoint"])
        else:
            (container,) = spec["spec"]["template"]["spec"]["containers"]
            yield file.name, [*container["command"], *container["args"]]
    yield "crontab", shlex.split(crontab()[1].partition("exec ")[2].partition(")")[0])


def crontab() -> tuple[list[str], str]:
    """Return (settings, command without the five fields of the time)."""
    lines = [
        text
        for text in (DEPLOY / "crontab").read_text().splitlines()
        if text and not text.startswith("#")
    ]
    assert re.match(r"(\S+ ){5}\(", lines[-1])
    return lines[:-1], lines[-1].split(maxsplit=5)[5]


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    steps = dockerfile()
    sources = [name for words in steps if words[0] == "COPY" for name in words[1:-1]]
    assert {"pyproject.toml", "olora_ray", "pipelines"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in sources} <= set(ignored)
    user = next(number for number, words in enumerate(steps) if words[0] == "USER")
    assert steps[user][1] != "root"


def test_jobs_call_scripts_of_the_project_with_fields_that_exist() -> None:
    found = dict(commands())
    assert found.keys() == {"rayjob.yaml", "raycronjob.yaml", "cronjob.yaml", "crontab"}
    for name, words in found.items():
        where = "" if name == "crontab" else IMAGE
        parts = " ".join(words).split(" -- ")
        scripts = [part.split()[1] for part in parts]
        submits = name in (
            "crontab",
            "cronjob.yaml",
        )  # those run beside the cluster, the others on it
        assert scripts[:-1] == [
            f"{where}deploy/night.py",
            *[f"{where}deploy/submit.py"] * submits,
        ], name
        assert all(part.startswith("python ") for part in parts)
        assert all((ROOT / script.removeprefix(IMAGE)).is_file() for script in scripts), name
        config, *changes = parts[-1].split()[2:]
        assert parts[0].split()[-1] == config, (
            f"{name}: who is told stands in the config of the run"
        )
        for field in parse_assignments(changes):
            assert field in ("run.storage", "cluster.workers", "cluster.gpus_per_worker")


def cron(
    tmp_path: Path, code: int, config: str = "c.yaml", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the crontab's line as cron does; a stand-in for submit.py's job ends with `code`."""
    settings, command = crontab()
    assert "%" not in command  # cron takes it for the end of the line
    recorder(
        tmp_path / "bin" / "python",
        f'case $1 in deploy/night.py) exec {sys.executable} "$@";; esac\n'
        f'echo "$RAY_AUTH_MODE $RAY_ADDRESS $*"; exit {code}',
    )
    given = dict(text.split("=", 1) for text in settings)
    mine = {
        "PROJECT": str(ROOT),
        "BIN": str(tmp_path / "bin"),
        "CONFIG": config,
        "JOB": "nightly",
        "LOG": str(tmp_path / "log"),
    }
    environment = {**given, **mine, **changes, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    assert mine.keys() <= given.keys()
    return ran([given["SHELL"], "-c", command], code=None, env=environment)


@pytest.mark.parametrize("code", [0, 2])
def test_cron_gets_the_code_of_the_night_and_mails_the_end_of_the_log_of_a_bad_one(
    tmp_path: Path, code: int
) -> None:
    done = cron(tmp_path, code)
    log = (tmp_path / "log").read_text().splitlines()
    job = "deploy/submit.py --working-dir . nightly -- python pipelines/retrain.py c.yaml"
    assert f"token http://127.0.0.1:8265 {job}" in log
    assert log[-1].endswith(f" exit code {code}")
    assert (done.returncode, done.stdout.splitlines()) == (code, log if code else [])


def recorder(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("gpu", "driver"), [(False, ""), (True, "580.95.05"), (True, "550.144.03"), (True, "")]
)
def test_a_node_installs_the_lock_and_without_a_gpu_no_cuda(
    tmp_path: Path, gpu: bool, driver: str
) -> None:
    recorder(tmp_path / "bin" / "nvidia-smi", f"echo {driver}")
    recorder(tmp_path / "bin" / "python3", f"echo python3 $* >>{tmp_path}/said")
    recorder(tmp_path / ".local" / "bin" / "uv", f"echo uv $* >>{tmp_path}/said")
    device = tmp_path / "nvidia0"
    if gpu:
        device.touch()
    environment = {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "GPU_DEVICE": str(device),
    }
    done = subprocess.run(
        ["bash", DEPLOY / "install_node.sh"], env=environment, capture_output=True, check=False
    )
    if gpu and driver < "580":
        assert done.returncode == 1
        assert f"580 or newer, and this node has {driver or 'none'}: " in done.stderr.decode()
        return
    assert done.returncode == 0
    *_, packages, project = (tmp_path / "said").read_text().splitlines()
    assert project.endswith(f"--no-deps {ROOT}")
    file = Path(packages.rpartition(" -r ")[2])
    text, whole = file.read_text(), (DEPLOY / "requirements.lock").read_text()
    assert ("--torch-backend=cpu" in packages) is not gpu
    if gpu:
        assert file == DEPLOY / "requirements.lock"
        return
    left_out = re.findall(r"^(?:nvidia-|cuda-|triton==)\S+ \\\n(?:    .*\n)+", whole, re.MULTILINE)
    assert len(left_out) > 10
    for entry in left_out:
        whole = whole.replace(entry, "")
    # Its index for CPUs has other files than PyPI.
    assert text == re.sub(r"(?m)^(torch==\S+) \\\n(?:    .*\n)+", r"\1\n", whole)


def test_a_worker_pod_announces_its_own_node_before_it_is_stopped(tmp_path: Path) -> None:
    inside = ["unshare", "--fork", "--pid", "--mount-proc"]  # a pod has no other raylet
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root and PID namespaces")
    recorder(tmp_path / "ray", f"echo $* >>{tmp_path}/said")
    stands = "until grep --quiet --text node_id=abc /proc/$!/cmdline; do sleep 0.1; done"
    raylet = "bash -c 'sleep 60; true' raylet --node_id=abc"
    pod = f"{raylet} & {stands}; bash {DEPLOY}/drain.sh 0"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run([*inside, "bash", "-c", pod], env=environment, check=True, timeout=60)
    drain, stop = (tmp_path / "said").read_text().splitlines()
    assert drain.startswith("drain-node --node-id abc --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert drain.endswith(" --deadline-remaining-seconds 0")
    assert stop == "stop --force"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_units_start_ray_as_the_pages_say(tmp_path: Path, role: str) -> None:
    file = DEPLOY / "systemd" / f"olora-ray-{role}.service"
    lines = dict(
        line.split("=", 1) for line in file.read_text().splitlines() if line.startswith("Exec")
    )
    ray, start, *options = lines["ExecStart"].split()
    assert (Path(ray).name, start) == ("ray", "start")
    known = {name for parameter in scripts.start.params for name in parameter.opts}
    assert {option.partition("=")[0] for option in options} <= known
    if role == "worker":
        assert (ROOT / lines["ExecStop"].split()[1].partition("olora_ray/")[2]).is_file()
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    text = (
        file.read_text()
        .replace("/home/ubuntu/olora_env/bin/ray", "/bin/true")
        .replace("User=ubuntu", "User=root")
    )
    (tmp_path / file.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / file.name], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
