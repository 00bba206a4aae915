"""The manifests fit KubeRay's schemas, contain no secret, and run with few rights."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.ran import ran

Tree = dict[str, Any]
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
SCHEMA: Tree = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
CUSTOM = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml")
OTHERS = ("cronjob.yaml", "storage.yaml", "accounts.yaml", "network.yaml", "monitoring.yaml")
NIGHT = "/opt/olora_ray/deploy/night.py"


def manifest(name: str) -> Tree:
    tree: Tree = yaml.safe_load((FOLDER / name).read_text())
    return tree


def cluster(name: str) -> Tree:
    spec: Tree = manifest(name)["spec"]
    spec = spec.get("jobTemplate", spec)
    found: Tree = spec.get("rayClusterSpec", spec)
    return found


def mappings(tree: Any) -> Iterator[Tree]:
    """Yield a mapping and all below it."""
    if isinstance(tree, dict):
        yield tree
        tree = tree.values()
    elif not isinstance(tree, list):
        return
    for value in tree:
        yield from mappings(value)


def pods(tree: Any) -> Iterator[Tree]:
    return (each for each in mappings(tree) if "containers" in each)


def found_under(tree: Any, key: str) -> Iterator[Any]:
    return (each[key] for each in mappings(tree) if key in each)


def test_the_kustomization_offers_every_manifest_and_names_image_and_mlflow_for_all() -> None:
    tree = manifest("kustomization.yaml")
    text = (FOLDER / "kustomization.yaml").read_text()
    assert set(re.findall(r"^  (?:# )?- (\w+\.yaml)", text, re.MULTILINE)) == {*CUSTOM, *OTHERS}
    assert set(tree["resources"]) < {*CUSTOM, *OTHERS}
    (image,), (made,) = tree["images"], tree["configMapGenerator"]
    assert [text.partition("=")[0] for text in made["literals"]] == [
        "MLFLOW_TRACKING_URI",
        "HF_HOME",
    ]
    # The names in Ray's kinds are not rewritten, so the ConfigMap must keep its own.
    assert tree["generatorOptions"] == {"disableNameSuffixHash": True}
    for name in (*CUSTOM, "cronjob.yaml"):
        assert set(found_under(manifest(name), "image")) == {image["name"]}
        maps = [each["name"] for each in found_under(manifest(name), "configMapRef")]
        assert set(maps) <= {made["name"]}
        assert len(maps) == len(list(pods(cluster(name)))) if name in CUSTOM else not maps


def test_the_operator_of_prometheus_gets_the_same_alerts_and_the_port_of_all_pods() -> None:
    monitor, rule = yaml.safe_load_all((FOLDER / "monitoring.yaml").read_text())
    nights, operator = rule["spec"]["groups"]
    assert [nights] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())[
        "groups"
    ]
    assert all("kuberay_job_deployment_status" in alert["expr"] for alert in operator["rules"])
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for name in CUSTOM:
        ports = [{port["name"] for port in ports} for ports in found_under(cluster(name), "ports")]
        assert all(endpoint["port"] in each for each in ports), name


@pytest.mark.parametrize("name", CUSTOM)
def test_manifests_fit_the_schemas_of_kuberay_and_ask_for_a_token(name: str) -> None:
    tree = manifest(name)
    jsonschema.validate(tree, {**SCHEMA, "$ref": f"#/$defs/{tree['kind']}"})
    assert cluster(name)["authOptions"] == {"mode": "token"}


def test_the_patch_for_kueue_gives_a_run_of_fixed_size_that_waits(tmp_path: Path) -> None:
    """Kueue makes a Workload of a job: its groups of pods with their numbers, which must be final."""
    rendered(tmp_path, "kuberay")  # makes a copy
    file = tmp_path / "deploy/kuberay/kustomization.yaml"
    file.write_text(
        re.sub(r"^# (patches:|  - |    patch:)", r"\1", file.read_text(), flags=re.MULTILINE)
    )
    (job,) = (each for each in rendered(tmp_path, "kuberay") if each["kind"] == "RayJob")
    assert (
        job["spec"]["suspend"] is job["spec"]["shutdownAfterJobFinishes"] is True
    )  # Kueue asks for both
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    groups = [
        ("head", 1, spec["headGroupSpec"]["template"]),
        ("submitter", 1, job["spec"]["submitterPodTemplate"]),
    ]
    groups += [
        (each["groupName"], each["replicas"], each["template"]) for each in spec["workerGroupSpecs"]
    ]
    assert {name: number for name, number, _ in groups} == {
        "head": 1,
        "submitter": 1,
        "gpu": 4,
        "prepare": 0,
    }


def rendered(tmp_path: Path, name: str) -> list[Tree]:
    """Return what `kubectl kustomize` makes of a folder of deploy/, with every manifest that is offered."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    copy = tmp_path / "deploy"
    if not copy.exists():
        for each in ("kuberay", "kuberay-team"):
            shutil.copytree(ROOT / "deploy" / each, copy / each)
        file = copy / "kuberay" / "kustomization.yaml"
        file.write_text(
            re.sub(r"^  # - (\w+\.yaml)", r"  - \1", file.read_text(), flags=re.MULTILINE)
        )
    done = ran(["kubectl", "kustomize", copy / name])
    return list(yaml.safe_load_all(done.stdout))


NAMES = ("claimName", "serviceAccountName", "priorityClassName", "olora-ray/cluster")
REFERENCES = ("configMapRef", "secretRef", "secretKeyRef")


def names_of(documents: list[Tree]) -> set[tuple[str, str]]:
    """Return all names that resources have, or by which they name others."""
    found = {(document["kind"], document["metadata"]["name"]) for document in documents}
    found |= {(key, each) for key in NAMES for each in found_under(documents, key)}
    return found | {
        (key, each["name"]) for key in REFERENCES for each in found_under(documents, key)
    }


def test_a_second_team_shares_no_name_with_the_first(tmp_path: Path) -> None:
    first, second = (
        names_of(rendered(tmp_path, "kuberay")),
        names_of(rendered(tmp_path, "kuberay-team")),
    )
    assert second == {(key, f"{name}-support") for key, name in first}
    assert {key for key, _ in first} > {
        *NAMES,
        *REFERENCES,
        "RayJob",
        "NetworkPolicy",
        "PodMonitor",
    }


@pytest.mark.parametrize("name", [*CUSTOM, "cronjob.yaml"])
def test_pods_are_bounded_and_unprivileged_and_have_secrets_by_reference(name: str) -> None:
    found = list(pods(manifest(name)))
    assert found
    for pod in found:
        # What Pod Security's level "restricted" asks for.
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        # No pod but the head, which scales the cluster, speaks to Kubernetes.
        speaks = None if container["name"] == "ray-head" else False
        assert pod.get("automountServiceAccountToken") is speaks
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == {
            volume["name"] for volume in pod.get("volumes", [])
        }
        for variable in container.get("env", []):
            secret = any(
                word in variable["name"]
                for word in ("TOKEN", "PASSWORD", "USERNAME", "KEY", "NOTIFY", "PING")
            )
            assert (
                "valueFrom" in variable and "secretKeyRef" in variable["valueFrom"]
            ) is secret, variable["name"]
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            assert {"secretRef": {"name": "olora-ray-secrets", "optional": True}} in container[
                "envFrom"
            ]
    for options in found_under(
        manifest(name), "autoscalerOptions"
    ):  # the container that KubeRay adds to the head
        assert options["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_night_fits_its_cluster_and_ends_before_it_is_cut_off(name: str) -> None:
    spec = manifest(name)["spec"]
    spec = spec.get("jobTemplate", spec)
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", NIGHT]
    hours = float(words[words.index("--hours") + 1]) if "--hours" in words else 20
    assert hours * 3600 < spec["activeDeadlineSeconds"]
    fields = dict(word.split("=") for word in words if "=" in word)
    gpu = next(group for group in cluster(name)["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert json.loads(fields["cluster.workers"]) == [gpu["minReplicas"], gpu["maxReplicas"]]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "cronjob.yaml"])
def test_the_network_lets_submitters_reach_the_dashboard(name: str) -> None:
    among, jobs, _ = manifest("network.yaml")["spec"]["ingress"]
    assert among["from"][0]["podSelector"]["matchLabels"].items() >= {
        ("olora-ray/cluster", "olora-ray")
    }
    submits = jobs["from"][0]["podSelector"]["matchLabels"]
    labels = [pod["labels"] for pod in found_under(manifest(name), "metadata") if "labels" in pod]
    assert submits in labels
