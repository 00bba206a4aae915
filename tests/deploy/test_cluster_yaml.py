import copy
import re
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES: dict[str, Any] = TREE["available_node_types"]
STARTS: dict[str, str] = {
    role: next(command for command in TREE[f"{role}_start_ray_commands"] if "ray start" in command)
    for role in ("head", "worker")
}


def on_premise() -> dict[str, Any]:
    """The file as its comment says to change it for machines that are there already."""
    text = (ROOT / "cluster.yaml").read_text()
    lines = [
        line.removeprefix("#   ")
        for line in text.splitlines()
        if re.match(r"#   (provider|auth): ", line)
    ]
    (told,) = re.findall(r"^# and delete ([^.]*)\.", text, re.MULTILINE)
    gone = re.split(r", | and ", told)
    assert set(gone) < TREE.keys()
    return {name: value for name, value in TREE.items() if name not in gone} | yaml.safe_load(
        "\n".join(lines)
    )


def test_the_recipe_for_machines_that_are_there_starts_ray_on_all_of_them() -> None:
    tree = on_premise()
    prepared = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(tree["provider"]["worker_ips"]) == 2
    # Workers are made by the autoscaler on the head: without its config it only looks on (ray's monitor.py).
    head = next(
        command for command in prepared["head_start_ray_commands"] if "ray start" in command
    )
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head.split()
    # It has no other key than the one that `ray up` copies to the head (commands.py).
    assert prepared["auth"]["ssh_private_key"]
    assert "$RAY_HEAD_IP" in prepared["worker_start_ray_commands"][-1]


def test_authentication_is_on_everywhere_and_the_dashboard_on_loopback() -> None:
    for command in STARTS.values():
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token;.*ray start", command)
    assert "~/.ray/auth_token" in TREE["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in STARTS["head"].split()


def test_the_project_that_is_installed_is_copied_first() -> None:
    local = [Path(path) for path in TREE["file_mounts"].values() if not path.startswith("~")]
    assert [path for path in local if not (ROOT / path).exists()] == []
    assert {"olora_ray", "pipelines", "pyproject.toml"} <= {str(path) for path in local}
    assert TREE["setup_commands"][-1] == "bash ~/olora_ray/deploy/install_node.sh"
    assert "deploy" in TREE["file_mounts"].values()
    for command in STARTS.values():
        (settings,) = re.findall(r"\. ~/olora_ray/(\S+);", command)
        assert (ROOT / settings).is_file()
