"""What `ray up` would ask of AWS, Google Cloud and Azure, by Ray's own bootstrap of the shipped files."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler import _private as autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

Tree = dict[str, Any]
ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "deploy/gcp.yaml", "deploy/azure.yaml")


def loaded(file: str, **replaced: str) -> Tree:
    """Return a shipped file after Ray's validation, with what its comment tells the user to fill in."""
    text = (ROOT / file).read_text()
    for word, value in replaced.items():
        assert word in text
        text = text.replace(word, value)
    tree: Tree = prepare_config(yaml.safe_load(text))
    validate_config(tree)
    return tree


def tags(kind: str) -> dict[str, str]:
    role = "head" if kind == "head" else "worker"
    return {
        "ray-node-type": role,
        "ray-user-node-type": kind,
        "ray-node-name": kind,
        "ray-launch-config": kind,
    }


@pytest.mark.parametrize("file", FILES)
def test_all_clouds_have_the_same_nodes_and_the_same_commands(file: str) -> None:
    tree, aws = loaded(file), loaded("cluster.yaml")
    gpus = {
        name: kind["resources"].get("GPU") for name, kind in tree["available_node_types"].items()
    }
    assert gpus == {"head": 0, "gpu_on_demand": 1, "gpu": 1, "gpu8": 8, "prepare": None}
    for section in (
        "file_mounts",
        "head_start_ray_commands",
        "worker_start_ray_commands",
        "rsync_exclude",
    ):
        assert tree[section] == aws[section]
    assert tree["setup_commands"][:2] == aws["setup_commands"][:2]
    watch = next(
        place
        for place, line in enumerate(tree["worker_start_ray_commands"])
        if "watch_node.sh" in line
    )
    assert watch == 0, "the watcher runs before Ray, so that a node whose head is gone ends"


def asked_of_ec2(tree: Tree) -> dict[str, Tree]:
    """Return what Ray's provider sends to RunInstances for each node type."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    tree = AWSNodeProvider.bootstrap_config(tree)
    provider = AWSNodeProvider(tree["provider"], tree["cluster_name"])
    sent: list[Tree] = []
    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register(
        "provide-client-params.ec2.RunInstances",
        lambda params, **_: sent.append(copy.deepcopy(params)),
    )
    for name, kind in tree["available_node_types"].items():
        provider.create_node(kind["node_config"], tags(name), 1)
    return dict(zip(tree["available_node_types"], sent, strict=True))


def test_ec2_is_asked_for_named_images_closed_ports_and_nodes_that_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    own = {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, text in (
        own | {"AWS_DEFAULT_REGION": "us-west-2", "MOTO_EC2_LOAD_DEFAULT_AMIS": "true"}
    ).items():
        monkeypatch.setenv(name, text)
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        for name in ("olora-ray-head", "olora-ray-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        group = ec2.create_security_group(GroupName="olora-ray", Description="olora-ray")["GroupId"]
        rule = {
            "IpProtocol": "tcp",
            "FromPort": 22,
            "ToPort": 22,
            "IpRanges": [{"CidrIp": "203.0.113.7/32"}],
        }
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
        with pytest.raises(AssertionError):
            asked_of_ec2(
                loaded("cluster.yaml")
            )  # nobody has written a group: nothing starts that is open to all
        sent = asked_of_ec2(loaded("cluster.yaml", **{"sg-REPLACE": group}))
        groups = ec2.describe_security_groups()["SecurityGroups"]
        assert [each["GroupName"] for each in groups if each["GroupName"] != "default"] == [
            "olora-ray"
        ]
        ports = [
            (rule["FromPort"], rule["IpRanges"][0]["CidrIp"])
            for each in groups
            for rule in each["IpPermissions"]
        ]
        assert ports == [(22, "203.0.113.7/32")]
    ubuntu = "resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
    driver = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    assert {name: shown(params, group) for name, params in sent.items()} == {
        "head": ("m6i.2xlarge", ubuntu, 100, "olora-ray-head", None, None),
        "gpu_on_demand": ("g6e.xlarge", driver, 200, "olora-ray-worker", None, "terminate"),
        "gpu": ("g6e.xlarge", driver, 200, "olora-ray-worker", "spot", "terminate"),
        "gpu8": ("g6e.48xlarge", driver, 200, "olora-ray-worker", None, "terminate"),
        "prepare": ("m6i.4xlarge", ubuntu, 200, "olora-ray-worker", "spot", "terminate"),
    }


def shown(params: Mapping[str, Any], group: str) -> tuple[Any, ...]:
    """Return type, image, disk, role, market and shutdown behaviour of a request, after what all have in common."""
    assert params["SecurityGroupIds"] == [group]
    assert params["KeyName"] == "ray-autoscaler_us-west-2"
    assert params["MetadataOptions"] == {"HttpTokens": "required"}
    (disk,) = params["BlockDeviceMappings"]
    market = params.get("InstanceMarketOptions", {}).get("MarketType")
    rest = (
        params["IamInstanceProfile"]["Name"],
        market,
        params.get("InstanceInitiatedShutdownBehavior"),
    )
    return params["InstanceType"], params["ImageId"], disk["Ebs"]["VolumeSize"], *rest


class Google:
    """A stand-in for Google's server: an HTTP client of googleapiclient that records what is inserted."""

    def __init__(self) -> None:
        self.inserted: list[Tree] = []

    def request(
        self, uri: str, method: str = "GET", body: Any = None, **_: Any
    ) -> tuple[Any, bytes]:
        import httplib2

        answer: Tree = {}
        if method == "GET" and "/serviceAccounts/" in uri:
            answer = {
                "email": uri.partition("/serviceAccounts/")[2].partition("?")[0],
                "projectId": "mine",
            }
        elif "/instances" in uri:
            self.inserted.append(json.loads(body))
            answer = {"name": "operation"}
        else:
            answer = {
                "projectId": "mine",
                "lifecycleState": "ACTIVE",
                "commonInstanceMetadata": {"items": []},
            }
            answer |= {"name": "mine", "bindings": [], "status": "DONE", "done": True}
        return httplib2.Response({"status": 200, "content-type": "application/json"}), json.dumps(
            answer
        ).encode()


def test_google_is_asked_for_named_images_and_a_network_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = pytest.importorskip("googleapiclient.discovery")
    from ray.autoscaler._private.gcp import config, node

    class Compute(node.GCPCompute):  # type: ignore[misc]
        def get_new_authorized_http(self, http: Any) -> Any:
            return http

    monkeypatch.setenv("HOME", str(tmp_path))
    google = Google()
    crm, iam, compute = (
        discovery.build(name, "v1", http=google, cache_discovery=False, static_discovery=True)
        for name in ("cloudresourcemanager", "iam", "compute")
    )
    tree = loaded("deploy/gcp.yaml", PROJECT="mine")
    steps = {
        name: getattr(config, f"_configure_{name}")
        for name in ("project", "iam_role", "key_pair", "subnet")
    }
    tree = steps["project"](tree | {"head_node": {}}, crm)
    tree = steps["subnet"](steps["key_pair"](steps["iam_role"](tree, crm, iam), compute), compute)
    place = (
        tree["provider"]["project_id"],
        tree["provider"]["availability_zone"],
        tree["cluster_name"],
    )
    resource = Compute(compute, *place)
    for name, kind in tree["available_node_types"].items():
        extra = tree["head_node"] if name == "head" else {}
        resource.create_instance(kind["node_config"] | extra, tags(name), wait_for_operation=False)
    found = {}
    for body in google.inserted:
        (disk,), (interface,) = body["disks"], body["networkInterfaces"]
        assert interface["subnetwork"] == "projects/mine/regions/us-central1/subnetworks/olora-ray"
        assert disk["initializeParams"]["diskSizeGb"] == 200
        image = disk["initializeParams"]["sourceImage"].split("/")
        role = body["serviceAccounts"][0]["email"].partition("@")[0]
        market = body.get("scheduling", {}).get("provisioningModel")
        found[body["labels"]["ray-user-node-type"]] = (
            body["machineType"].split("/")[-1],
            image[-1],
            role,
            market,
        )
    driver = "common-cu129-ubuntu-2204-nvidia-580"
    assert found == {
        "head": ("n2-standard-8", "ubuntu-2404-lts-amd64", "ray-autoscaler-sa-v1", None),
        "gpu_on_demand": ("g2-standard-8", driver, "olora-ray-worker", None),
        "gpu": ("g2-standard-8", driver, "olora-ray-worker", "SPOT"),
        "gpu8": ("g2-standard-96", driver, "olora-ray-worker", None),
        "prepare": ("n2-standard-16", "ubuntu-2404-lts-amd64", "olora-ray-worker", "SPOT"),
    }


def test_azures_templates_know_what_the_file_sets() -> None:
    folder = Path(autoscaler.__file__).parent / "_azure"
    known = json.loads((folder / "azure-vm-template.json").read_text())["parameters"]
    tree = loaded("deploy/azure.yaml")
    for name, kind in tree["available_node_types"].items():
        given = kind["node_config"]["azure_arm_parameters"]
        assert given.keys() <= known.keys()
        types = {"string": str, "int": int}
        assert all(isinstance(value, types[known[key]["type"]]) for key, value in given.items())
        assert (given.get("priority") == "Spot") is (name in ("gpu", "prepare"))
        assert {"vmSize", "imagePublisher", "imageOffer", "imageSku", "osDiskSize"} <= given.keys()
    # The rule that the file tells to narrow after the first `ray up`.
    template = json.loads((folder / "azure-config-template.json").read_text())
    (rules,) = (
        found
        for each in template["resources"]
        if (found := each.get("properties", {}).get("securityRules"))
    )
    (command,) = re.findall(
        r"--nsg-name (\S+) --name (\S+)", (ROOT / "deploy/azure.yaml").read_text()
    )
    pattern = "[concat('ray-', parameters('clusterId'), '-nsg')]"
    assert template["variables"]["nsgName"] == pattern
    assert command == (
        f"ray-{tree['cluster_name']}-{tree['provider']['unique_id']}-nsg",
        rules[0]["name"],
    )
