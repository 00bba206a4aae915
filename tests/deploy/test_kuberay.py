"""The manifests fit KubeRay's schemas, contain no secret, and run with few rights."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Tree = dict[str, Any]
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
SCHEMA: Tree = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
CUSTOM = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml")
OTHERS = ("cronjob.yaml", "storage.yaml", "network.yaml", "monitoring.yaml")
NIGHT = "/opt/olora_ray/deploy/night.py"


def manifest(name: str) -> Tree:
    tree: Tree = yaml.safe_load((FOLDER / name).read_text())
    return tree


def cluster(name: str) -> Tree:
    spec: Tree = manifest(name)["spec"]
    spec = spec.get("jobTemplate", spec)
    found: Tree = spec.get("rayClusterSpec", spec)
    return found


def pods(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pods(value)


def found_under(tree: Any, key: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        for value in tree.values():
            yield from found_under(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from found_under(value, key)


def validate(tree: Tree) -> None:
    jsonschema.validate(tree, {**SCHEMA, "$ref": f"#/$defs/{tree['kind']}"})


def test_the_kustomization_offers_every_manifest_and_names_image_and_mlflow_for_all() -> None:
    tree = manifest("kustomization.yaml")
    text = (FOLDER / "kustomization.yaml").read_text()
    assert set(re.findall(r"^  (?:# )?- (\w+\.yaml)", text, re.MULTILINE)) == {*CUSTOM, *OTHERS}
    assert set(tree["resources"]) < {*CUSTOM, *OTHERS}
    (image,), (made,) = tree["images"], tree["configMapGenerator"]
    assert [text.partition("=")[0] for text in made["literals"]] == ["MLFLOW_TRACKING_URI"]
    # The names in Ray's kinds are not rewritten, so the ConfigMap must keep its own.
    assert tree["generatorOptions"] == {"disableNameSuffixHash": True}
    for name in (*CUSTOM, "cronjob.yaml"):
        assert set(found_under(manifest(name), "image")) == {image["name"]}
        maps = [each["name"] for each in found_under(manifest(name), "configMapRef")]
        assert set(maps) <= {made["name"]}
        assert len(maps) == len(list(pods(cluster(name)))) if name in CUSTOM else not maps


def test_the_operator_of_prometheus_gets_the_same_alerts_and_the_port_of_all_pods() -> None:
    monitor, rule = yaml.safe_load_all((FOLDER / "monitoring.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for name in CUSTOM:
        ports = [{port["name"] for port in ports} for ports in found_under(cluster(name), "ports")]
        assert all(endpoint["port"] in each for each in ports), name


def test_the_patch_for_kueue_gives_a_run_of_fixed_size_that_waits() -> None:
    patch, job = manifest("kueue.yaml"), manifest("rayjob.yaml")
    assert (patch["kind"], patch["metadata"].pop("name")) == (job["kind"], job["metadata"]["name"])
    merged = merge(job, patch)
    validate(merged)
    assert "kueue.x-k8s.io/queue-name" in merged["metadata"]["labels"]
    assert merged["spec"]["suspend"] is merged["spec"]["shutdownAfterJobFinishes"] is True  # Kueue asks for both
    assert merged["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False


def merge(tree: Tree, patch: Tree) -> Tree:
    """Return Kustomize's result for a patch without lists."""
    both = {key: merge(tree[key], value) for key, value in patch.items() if isinstance(tree.get(key), dict)}
    return {**tree, **patch, **both}


@pytest.mark.parametrize("name", CUSTOM)
def test_manifests_fit_the_schemas_of_kuberay(name: str) -> None:
    validate(manifest(name))


@pytest.mark.parametrize("name", CUSTOM)
def test_the_head_trains_nothing_and_authentication_is_on(name: str) -> None:
    spec = cluster(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    params = spec["headGroupSpec"]["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("0", "0")
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"gpu", "prepare"}
    for group in groups.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpus = {key: _container(group)["resources"]["limits"].get("nvidia.com/gpu") for key, group in groups.items()}
    assert gpus == {"gpu": "1", "prepare": None}


@pytest.mark.parametrize("name", [*CUSTOM, "cronjob.yaml"])
def test_pods_are_bounded_and_unprivileged_and_have_secrets_by_reference(name: str) -> None:
    found = list(pods(manifest(name)))
    assert found
    for pod in found:
        # What Pod Security's level "restricted" asks for.
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == {
            volume["name"] for volume in pod.get("volumes", [])
        }
        for variable in container.get("env", []):
            secret = any(
                word in variable["name"] for word in ("TOKEN", "PASSWORD", "USERNAME", "KEY", "NOTIFY", "PING")
            )
            assert ("valueFrom" in variable and "secretKeyRef" in variable["valueFrom"]) is secret, variable["name"]
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            assert {"secretRef": {"name": "olora-ray-secrets", "optional": True}} in container["envFrom"]
    for options in found_under(manifest(name), "autoscalerOptions"):  # the container that KubeRay adds to the head
        assert options["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", [*CUSTOM, "cronjob.yaml"])
def test_no_pod_but_the_head_which_scales_the_cluster_can_speak_to_kubernetes(name: str) -> None:
    for pod in pods(manifest(name)):
        head = pod["containers"][0]["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken") is (None if head else False)


def test_the_cronjob_submits_to_the_cluster_with_its_token() -> None:
    tree, standing = manifest("cronjob.yaml"), manifest("raycluster.yaml")["metadata"]["name"]
    assert (tree["apiVersion"], tree["kind"]) == ("batch/v1", "CronJob")
    assert tree["spec"]["concurrencyPolicy"] == "Forbid"
    job = tree["spec"]["jobTemplate"]["spec"]
    assert 0 < job["activeDeadlineSeconds"] < 24 * 3600, "one that hangs must not hold up the next night"
    (pod,) = pods(tree)
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    container = pod["containers"][0]
    words = [*container["command"], *container["args"]]
    submitted = words[words.index("--") + 1 :]
    assert submitted[1:4] == ["/opt/olora_ray/deploy/submit.py", "$(JOB_NAME)", "--"], (
        "a second submitter of the night follows the first one's job"
    )
    (name,) = (variable["valueFrom"] for variable in container["env"] if variable["name"] == "JOB_NAME")
    assert name == {"fieldRef": {"fieldPath": "metadata.labels['job-name']"}}
    variables = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
    assert variables["RAY_ADDRESS"]["value"] == f"http://{standing}-head-svc:8265"
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": standing, "key": "auth_token"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_run_has_as_many_workers_as_its_cluster_has_gpus(name: str) -> None:
    spec = manifest(name)["spec"]
    entrypoint = shlex.split(spec.get("jobTemplate", spec)["entrypoint"])
    words = dict(word.split("=") for word in entrypoint if "=" in word)
    gpu = next(group for group in cluster(name)["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert int(words["cluster.workers"]) == gpu["minReplicas"] == gpu["maxReplicas"]
    assert words["cluster.gpus_per_worker"] == "1"


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_no_second_cluster_starts_and_the_night_ends_before_it_is_cut_off(name: str) -> None:
    spec = manifest(name)["spec"]
    spec = spec.get("jobTemplate", spec)
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", NIGHT]
    assert spec["backoffLimit"] == 0
    hours = float(words[words.index("--hours") + 1]) if "--hours" in words else 20
    assert hours * 3600 < spec["activeDeadlineSeconds"]
    if name == "raycronjob.yaml":
        assert spec["activeDeadlineSeconds"] < 24 * 3600


def test_only_rays_pods_submitters_and_prometheus_reach_a_pod_of_ray() -> None:
    spec = manifest("network.yaml")["spec"]
    ray = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    assert spec["podSelector"] == ray["podSelector"]
    assert spec["policyTypes"] == ["Ingress"]
    among, jobs, metrics = spec["ingress"]
    assert among == {"from": [ray]}
    for rule, port in ((jobs, 8265), (metrics, 8080)):
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        assert all(any(peer[kind] for kind in peer) for peer in rule["from"]), "an empty selector is everybody"
    submits = jobs["from"][0]["podSelector"]["matchLabels"]
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        spec = manifest(name)["spec"]
        template = spec.get("jobTemplate", spec)["submitterPodTemplate"]
        assert template["metadata"]["labels"] == submits
    assert manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"] == submits


def _container(group: Tree) -> Tree:
    found: Tree = group["template"]["spec"]["containers"][0]
    return found
