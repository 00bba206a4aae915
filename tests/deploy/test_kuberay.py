"""The manifests fit KubeRay's schemas, contain no secret, and run with few rights."""

import json
import os
import re
import shlex
import shutil
import subprocess
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
OTHERS = ("cronjob.yaml", "storage.yaml", "accounts.yaml", "network.yaml", "monitoring.yaml")
CRDS = [Path(name) for name in os.environ.get("KUBERAY_CRDS", "").split(":") if name]
"""Folders with KubeRay's complete CRDs, one per release (ray-operator/config/crd/bases of its repository)."""
KUEUE_CRDS = os.environ.get("KUEUE_CRDS")
"""A folder with Kueue's (config/components/crd/bases of its repository)."""
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
def test_manifests_fit_the_schemas_of_kuberay(name: str) -> None:
    validate(manifest(name))


def strict(schema: Tree) -> Tree:
    """Turn a schema of a CRD into one of JSON Schema that refuses unknown fields, as `kubectl apply` does."""
    if schema.get("x-kubernetes-int-or-string") or schema.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        return {}
    made = {
        key: value for key, value in schema.items() if key not in ("format", "properties", "items")
    }
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    if "properties" in schema:
        made["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        made["additionalProperties"] = False
    return made | ({"items": strict(schema["items"])} if "items" in schema else {})


def broken_rules(schema: Tree, value: Any) -> Iterator[str]:
    """Yield the messages of the rules in CEL that a new object breaks."""
    celpy = pytest.importorskip("celpy")
    for each in schema.get("x-kubernetes-validations", ()):
        environment = celpy.Environment()
        program = (
            environment.program(environment.compile(each["rule"]))
            if "oldSelf" not in each["rule"]
            else None
        )
        if program and not program.evaluate({"self": celpy.json_to_cel(value)}):
            yield each["message"]
    if isinstance(value, dict):
        for name, part in value.items():
            yield from broken_rules(schema.get("properties", {}).get(name, {}), part)
    elif isinstance(value, list):
        for part in value:
            yield from broken_rules(schema.get("items", {}), part)


def stored(folder: Path) -> dict[str, Tree]:
    """Return the schema of each kind, of the version in which Kubernetes keeps it."""
    crds = [yaml.load(file.read_text(), yaml.CSafeLoader)["spec"] for file in folder.glob("*.yaml")]
    versions = ((crd["names"]["kind"], version) for crd in crds for version in crd["versions"])
    return {
        kind: version["schema"]["openAPIV3Schema"]
        for kind, version in versions
        if version["storage"]
    }


def fits(document: Tree, schema: Tree) -> None:
    metadata = {"metadata": {"type": "object"}}
    jsonschema.validate(
        document, strict(schema | {"properties": schema["properties"] | metadata}) | {"items": {}}
    )
    assert list(broken_rules(schema, document)) == []


@pytest.mark.skipif(not CRDS, reason="needs KUBERAY_CRDS=FOLDER[:FOLDER], KubeRay's complete CRDs")
def test_rendered_manifests_fit_the_complete_crds_and_their_rules(tmp_path: Path) -> None:
    documents = [*rendered(tmp_path, "kuberay"), *rendered(tmp_path, "kuberay-team")]
    for kinds in map(stored, CRDS):
        own = [document for document in documents if document["apiVersion"] == "ray.io/v1"]
        assert {document["kind"] for document in own} == {"RayCluster", "RayJob", "RayCronJob"}
        for document in own:
            schema = kinds[document["kind"]]
            fits(document, schema)
            wrong = {**document, "spec": {**document["spec"], "managedBy": "me"}}
            if document["kind"] != "RayCronJob":
                assert any("managedBy" in message for message in broken_rules(schema, wrong))


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
    sets = [
        {"name": name, "count": number, "template": template} for name, number, template in groups
    ]
    queue = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    workload = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "metadata": {}}
    if not KUEUE_CRDS:
        pytest.skip("rendered; needs KUEUE_CRDS=FOLDER, Kueue's CRDs, for the rest")
    fits(
        workload | {"spec": {"queueName": queue, "podSets": sets}},
        stored(Path(KUEUE_CRDS))["Workload"],
    )


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
    done = subprocess.run(
        ["kubectl", "kustomize", copy / name], check=True, capture_output=True, text=True
    )
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
    for group in (
        spec["headGroupSpec"],
        *groups.values(),
    ):  # a consolidation of nodes must not end a run
        kept = group["template"]["metadata"]["annotations"]
        assert kept == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
        assert group["template"]["metadata"]["labels"] == {"olora-ray/cluster": "olora-ray"}
    gpus = {
        key: _container(group)["resources"]["limits"].get("nvidia.com/gpu")
        for key, group in groups.items()
    }
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
    assert 0 < job["activeDeadlineSeconds"] < 24 * 3600, (
        "one that hangs must not hold up the next night"
    )
    (pod,) = pods(tree)
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    container = pod["containers"][0]
    words = [*container["command"], *container["args"]]
    submitted = words[words.index("--") + 1 :]
    assert submitted[1:4] == ["/opt/olora_ray/deploy/submit.py", "$(JOB_NAME)", "--"], (
        "a second submitter of the night follows the first one's job"
    )
    (name,) = (
        variable["valueFrom"] for variable in container["env"] if variable["name"] == "JOB_NAME"
    )
    assert name == {"fieldRef": {"fieldPath": "metadata.labels['job-name']"}}
    variables = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
    assert variables["RAY_ADDRESS"]["value"] == "http://$(CLUSTER)-head-svc:8265"
    assert (
        variables["CLUSTER"]["valueFrom"]["fieldRef"]["fieldPath"]
        == "metadata.labels['olora-ray/cluster']"
    )
    assert job["template"]["metadata"]["labels"]["olora-ray/cluster"] == standing
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": standing,
        "key": "auth_token",
    }


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_run_starts_with_one_gpu_and_has_at_most_as_many_workers_as_its_cluster(
    name: str,
) -> None:
    spec = manifest(name)["spec"]
    entrypoint = shlex.split(spec.get("jobTemplate", spec)["entrypoint"])
    words = dict(word.split("=") for word in entrypoint if "=" in word)
    gpu = next(group for group in cluster(name)["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert json.loads(words["cluster.workers"]) == [gpu["minReplicas"], gpu["maxReplicas"]]
    # KubeRay starts the job when this many pods run, and fails it if they do not come.
    assert gpu["replicas"] == gpu["minReplicas"] == 1
    assert spec.get("jobTemplate", spec)["preRunningDeadlineSeconds"] <= 7200
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
    own = {"olora-ray/cluster": "olora-ray"}
    ray = {"podSelector": {"matchLabels": own | {"ray.io/is-ray-node": "yes"}}}
    assert spec["podSelector"] == {"matchLabels": own}
    assert spec["policyTypes"] == ["Ingress"]
    among, jobs, metrics = spec["ingress"]
    assert among == {"from": [ray]}
    for rule, port in ((jobs, 8265), (metrics, 8080)):
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        assert all(any(peer[kind] for kind in peer) for peer in rule["from"]), (
            "an empty selector is everybody"
        )
    submits = jobs["from"][0]["podSelector"]["matchLabels"]
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        spec = manifest(name)["spec"]
        template = spec.get("jobTemplate", spec)["submitterPodTemplate"]
        assert template["metadata"]["labels"] == submits
    assert (
        manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
        == submits
    )


def _container(group: Tree) -> Tree:
    found: Tree = group["template"]["spec"]["containers"][0]
    return found
