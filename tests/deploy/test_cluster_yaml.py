import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from olora_ray.cluster import resources

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES: dict[str, Any] = TREE["available_node_types"]
STARTS: dict[str, str] = {
    role: next(command for command in TREE[f"{role}_start_ray_commands"] if "ray start" in command)
    for role in ("head", "worker")
}


def test_cluster_yaml_is_valid_for_rays_launcher() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(TREE, schema)
    # What `ray up` does before it asks the cloud for anything: limits that do not fit together, paths.
    validate_config(prepare_config(copy.deepcopy(TREE)))


def test_the_head_takes_no_work() -> None:
    head = TYPES[TREE["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(STARTS["head"].split())
    assert "InstanceMarketOptions" not in head["node_config"]  # the driver must stay


def test_workers_are_spot_instances_within_limits() -> None:
    workers = {name: kind for name, kind in TYPES.items() if name != TREE["head_node_type"]}
    for kind in workers.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= TREE["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sorted(kind["resources"].get("GPU", 0) for kind in workers.values()) == [0, 1]
    assert resources.room({"CPU": 1, "GPU": 1}, resources._launched(TREE)) == TYPES["gpu"]["max_workers"]


def test_authentication_is_on_everywhere_and_the_dashboard_on_loopback() -> None:
    for command in STARTS.values():
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token;.*ray start", command)
    assert "~/.ray/auth_token" in TREE["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in STARTS["head"].split()


def test_the_project_that_is_installed_is_copied_first() -> None:
    local = [Path(path) for path in TREE["file_mounts"].values() if not path.startswith("~")]
    assert [path for path in local if not (ROOT / path).exists()] == []
    assert {"olora_ray", "pipelines", "pyproject.toml"} <= {str(path) for path in local}
    *_, packages, project = TREE["setup_commands"]
    lock = packages.rpartition(" -r ~/olora_ray/")[2]
    assert lock == "deploy/requirements.lock"
    assert (ROOT / lock).is_file()
    assert project.endswith(" --no-deps ~/olora_ray")
    for command in STARTS.values():
        (settings,) = re.findall(r"\. ~/olora_ray/(\S+);", command)
        assert (ROOT / settings).is_file()


def test_the_nodes_variables_hold_an_address_and_no_secret() -> None:
    lines = (ROOT / "deploy" / "cluster.env").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert names == ["MLFLOW_TRACKING_URI"]
    assert "@" not in "".join(lines)
