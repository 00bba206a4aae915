"""What the recipes copy and call is there."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from olora_ray.config.dotted import parse_assignments

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGE = "/opt/olora_ray/"
"""Where the image has the project."""


def dockerfile() -> list[list[str]]:
    """The instructions, as words."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


PATIENT = f"{IMAGE}deploy/patient.sh"


def entrypoints() -> Iterator[tuple[str, list[str]]]:
    """(file, words) of each command of the project that a manifest or crontab runs, patiently or not."""
    for file in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        spec = yaml.safe_load(file.read_text())["spec"]
        spec = spec.get("jobTemplate", spec)
        if "entrypoint" in spec:
            yield file.name, shlex.split(spec["entrypoint"])
        elif "spec" in spec:
            yield file.name, spec["spec"]["template"]["spec"]["containers"][0]["args"]
    line = (DEPLOY / "crontab").read_text().splitlines()[-1]
    yield "crontab", shlex.split(line.partition(" -- ")[2].partition(";")[0])


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    steps = dockerfile()
    sources = [name for words in steps if words[0] == "COPY" for name in words[1:-1]]
    assert {"pyproject.toml", "olora_ray", "pipelines"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in sources} <= set(ignored)
    assert steps[0] == ["FROM", "python:3.11-slim"]
    lock, project = [" ".join(words[1:]) for words in steps if words[:3] == ["RUN", "pip", "install"]]
    assert lock.endswith(" -r requirements.lock")
    assert project.endswith(" --no-deps .")
    user = next(number for number, words in enumerate(steps) if words[0] == "USER")
    assert steps[user][1] != "root"
    assert not any(words[0] in ("RUN", "COPY") for words in steps[user:])
    assert "http" not in (DEPLOY / "Dockerfile").read_text()


def test_jobs_call_scripts_of_the_project_with_fields_that_exist() -> None:
    found = dict(entrypoints())
    assert found.keys() == {"rayjob.yaml", "raycronjob.yaml", "cronjob.yaml", "crontab"}
    for name, words in found.items():
        assert (words[0] == PATIENT) is (name != "crontab")
        python, script, config, *changes = words if name == "crontab" else words[1:]
        assert python == "python", name
        assert (ROOT / script.removeprefix(IMAGE)).is_file(), f"{name}: {script}"
        assert script.startswith(IMAGE) is (name != "crontab")
        assert config.endswith(".yaml") or config == "$CONFIG"
        for field in parse_assignments(changes):
            assert field in ("run.storage", "cluster.workers", "cluster.gpus_per_worker")


def test_the_crontab_has_five_fields_a_lock_and_a_log() -> None:
    *settings, line = [
        text for text in (DEPLOY / "crontab").read_text().splitlines() if text and not text.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Z]+=\S+", text) for text in settings)
    assert re.match(r"(\S+ ){5}mkdir -p ~/log; exec >>~/log/retrain.log 2>&1; cd \$PROJECT ", line)
    assert "%" not in line  # cron takes it for the end of the line
    command = line.split(maxsplit=5)[5]
    assert "flock --nonblock" in command
    assert "RAY_AUTH_MODE=token" in command
    subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("busy", [False, True])
def test_the_crontabs_command_logs_its_end_and_does_not_run_twice(tmp_path: Path, busy: bool) -> None:
    line = (DEPLOY / "crontab").read_text().splitlines()[-1]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text('#!/bin/bash\necho "$MLFLOW_TRACKING_URI $RAY_AUTH_MODE $*"; exit 2\n')
    (tmp_path / "bin" / "ray").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PROJECT": str(ROOT), "BIN": str(tmp_path / "bin"), "CONFIG": "c.yaml"}
    environment["PATH"] = "/usr/bin:/bin"
    (tmp_path / "log").mkdir()
    with open(tmp_path / "log" / "retrain.lock", "w") as lock:
        if busy:
            subprocess.run(["flock", "--nonblock", str(lock.fileno())], pass_fds=[lock.fileno()], check=True)
        subprocess.run(["bash", "-c", line.split(maxsplit=5)[5]], env=environment, check=True, timeout=60)
    log = (tmp_path / "log" / "retrain.log").read_text()
    assert log.rstrip().endswith("exit code 75" if busy else "exit code 2")
    assert ("failed to get lock" in log) is busy
    submitted = "http://mlflow.internal:5000 token job submit --working-dir . -- python pipelines/retrain.py c.yaml"
    assert (submitted in log) is not busy


def test_the_crontab_says_in_its_log_why_nothing_began(tmp_path: Path) -> None:
    """A wrong folder: cron's mail is read by nobody, and on the first night there was no log either."""
    line = (DEPLOY / "crontab").read_text().splitlines()[-1]
    environment = {"HOME": str(tmp_path), "PROJECT": str(tmp_path / "none"), "BIN": "/usr/bin", "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", line.split(maxsplit=5)[5]], env=environment, check=True, timeout=60)
    why, end = (tmp_path / "log" / "retrain.log").read_text().splitlines()
    assert "none: No such file or directory" in why
    assert end.endswith(" exit code 1")


def test_make_clean_leaves_what_was_trained() -> None:
    """The default run.storage is ./runs: models, checkpoints and the registry's database."""
    recipe = (ROOT / "Makefile").read_text().partition("\nclean:")[2].splitlines()[1]
    assert shlex.split(recipe)[:2] == ["rm", "-rf"]
    assert "runs" not in shlex.split(recipe)


def recorder(file: Path, text: str) -> None:
    """A program in place of another one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_node_installs_the_lock_and_without_a_gpu_no_cuda(tmp_path: Path, gpu: bool) -> None:
    recorder(tmp_path / "bin" / "python3", f"echo python3 $* >>{tmp_path}/said")
    recorder(tmp_path / ".local" / "bin" / "uv", f"echo uv $* >>{tmp_path}/said")
    device = tmp_path / "nvidia0"
    if gpu:
        device.touch()
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "GPU_DEVICE": str(device)}
    subprocess.run(["bash", DEPLOY / "install_node.sh"], env=environment, check=True)
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


def patient(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PATIENT_PAUSE": "0", "PATIENT_TIMES": "3", **variables}
    command = ["bash", str(DEPLOY / "patient.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_patience_is_for_exit_code_75_alone(code: int) -> None:
    done = patient("bash", "-c", f"echo once; exit {code}")
    assert (done.returncode, done.stdout) == (code, "once\n")


def test_a_command_that_says_later_is_repeated_until_it_is_done(tmp_path: Path) -> None:
    done = patient("bash", "-c", f"echo x >>{tmp_path}/n; [ $(wc -l <{tmp_path}/n) -ge 3 ] || exit 75; echo done")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "done"
    assert (tmp_path / "n").read_text() == "x\n" * 3


def test_what_is_unfinished_in_the_end_is_said_and_no_failure() -> None:
    done = patient("bash", "-c", "echo again; exit 75")
    assert done.returncode == 0
    assert done.stdout.splitlines().count("again") == 3
    assert done.stdout.splitlines()[-1].startswith("NOT FINISHED: exit code 75 for 3 times")


@pytest.mark.parametrize("busy", ["trap 'echo checkpoint; exit 143' TERM; echo began; sleep 3 & wait", "exit 75"])
def test_a_stop_reaches_the_command_and_ends_the_waiting(busy: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PATIENT_PAUSE": "30"}
    command = ["bash", str(DEPLOY / "patient.sh"), "bash", "-c", busy]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline()]  # that it has begun, or waits
        process.terminate()
        lines += process.stdout.read().splitlines()
        assert process.wait(30) == 143
    assert ("checkpoint" in lines) is (busy != "exit 75")
