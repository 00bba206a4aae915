"""A Ray of our own has no dashboard, and is not mixed up with others'; one that is joined gets its token or says no."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ran import ran
from tests.recovery.processes import scratch
from tests.waiting import until

pytestmark = pytest.mark.ray

SCRIPT = """
from olora_ray.common.logs import quiet_environment
quiet_environment()
import ray, sys
from olora_ray.cluster import ray_internals
from olora_ray.config import command_line
from olora_ray.cluster.connection import connect
from tests import tiny

def main(argv):
    with connect(tiny.config()):
        own = ray.get_runtime_context().gcs_address
        print("agent", ray.nodes()[0]["DashboardAgentListenPort"])
        page = ray._private.worker.global_worker.node.address_info["webui_url"]
        try:
            print("page", repr(page), "open to", ray_internals.version_at(own, None, timeout=30))
        except PermissionError:
            print("page", repr(page), "asks for a token")

command_line.run(main)
"""


def environment(home: Path) -> dict[str, str]:
    """Without Ray's variables, as most people have it; Ray's token lies in the home directory."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return found | {
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_TMPDIR": str(home),
    }


SLOW_AGENTS = """
    import time
    from pathlib import Path

    words = Path("/proc/self/cmdline").read_text()
    if "dashboard/agent.py" in words or "agent/main.py" in words:
        time.sleep(40)
"""


def connected(variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT]
    return ran(command, code=None, env=variables)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory, and a folder for temporary files whose path is short enough for sockets."""
    with scratch() as folder:
        yield folder


def test_a_ray_of_our_own_has_no_dashboard_and_asks_for_a_token(home: Path) -> None:
    done = connected(environment(home))
    assert done.returncode == 0, done.stdout + done.stderr
    [page] = [line for line in done.stdout.splitlines() if line.startswith("page ")]
    assert page == "page '' asks for a token"
    token = home / ".ray" / "auth_token"
    assert token.read_text() not in done.stdout + done.stderr
    assert token.stat().st_mode & 0o077 == 0


def test_a_temporary_folder_with_a_long_path_is_one_line(home: Path) -> None:
    """Schedulers set TMPDIR to a folder of the job; Ray ended in a traceback."""
    long = home / ("job" * 20)
    long.mkdir()
    done = connected({**environment(home), "RAY_TMPDIR": str(long)})
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert re.match(
        rf"error: RAY_TMPDIR \(or TMPDIR\): Ray cannot start there; set a short one, .*AF_UNIX .*{long}",
        line,
    )


def test_a_machine_on_which_rays_agents_need_40_s_starts_it_beside_the_usual_port(
    home: Path,
) -> None:
    (home / "sitecustomize.py").write_text(textwrap.dedent(SLOW_AGENTS))
    variables = environment(home)
    variables["PYTHONPATH"] += f":{home}"
    done = connected(variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^agent \d+$", done.stdout, re.M)
    assert "agent 52365" not in done.stdout, "a later `ray start --head` takes it"


def test_a_night_whose_ray_does_not_start_in_time_is_repeated_and_ends(home: Path) -> None:
    (home / "connect.py").write_text(SCRIPT)
    config = home / "night.yaml"
    config.write_text("{run: {name: a}, model: {name: m}, data: {train: [a]}}")
    first = "[ -e tried ] || export RAY_gcs_server_port_wait_time_s=0; touch tried"
    words = ["bash", "-c", f"cd {home}; {first}; exec {sys.executable} connect.py"]
    night = Path(__file__).parents[2] / "deploy" / "night.py"
    done = ran([sys.executable, night, "--pause", "0", config, "--", *words], env=environment(home))
    assert re.search(
        r"error: Ray did not start in time on this machine, whose load is \S+ on \d+ CPU",
        done.stderr,
    )
    assert "exit code 75: retrying" in done.stdout
    assert "\npage " in done.stdout


def test_sigterm_while_ray_starts_is_told_as_at_any_other_time(home: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(home), text=True, **pipes) as process:
        assert "starting Ray" in process.stdout.readline()
        until(lambda: "gcs_server" in str(list(home.rglob("gcs_server*"))))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        last = process.stderr.read().splitlines()[-1]
    assert last == "stopped (SIGTERM); run the same command again to resume"
