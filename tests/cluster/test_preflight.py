"""A run that cannot work is refused before it costs anything, with all that is wrong in one line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from olora_ray.cluster import node_facts, preflight, resources
from olora_ray.cluster.decide import decide, decide_evaluation
from olora_ray.cluster.node_facts import NodeInfo
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.config.tables import FORMATS
from olora_ray.model.source import BaseModel, obtain
from olora_ray.train.estimate import estimate
from tests import plugins, tiny
from tests.pipelines import project
from tests.recovery import processes
from tests.refused import refused
from tests.said import said

RAY = str(Path(sys.executable).parent / "ray")
PORT = 26579


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """Two nodes of one CPU. Yields a folder that both see; its `own` is another one on the second node.

    The second node, 127.0.0.2, has another torch, as far as its metadata tells.
    """
    if os.geteuid() != 0:
        pytest.skip("a folder that only one node sees needs root")
    with processes.scratch() as folder, pytest.MonkeyPatch.context() as patch:
        (folder / "shared" / "own").mkdir(parents=True)
        (other := folder / "other" / "torch-9.9.9.dist-info").mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
        for name, value in {"RAY_AUTH_MODE": "disabled", "HOME": str(folder)}.items():
            patch.setenv(name, value)
        start = [
            RAY,
            "start",
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ]
        _run(
            *start,
            "--head",
            f"--port={PORT}",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}/1",
        )
        patch.setenv("PYTHONPATH", f"{other.parent}:{os.environ.get('PYTHONPATH', '')}")
        join = [
            *start,
            f"--address=127.0.0.1:{PORT}",
            "--node-ip-address=127.0.0.2",
            f"--temp-dir={folder}/2",
        ]
        hide = f"mount -t tmpfs none {folder}/shared/own && exec {' '.join(join)}"
        _run("unshare", "--mount", "sh", "-c", hide)
        ray.init(
            address=f"127.0.0.1:{PORT}", logging_level="ERROR", runtime_env={"env_vars": {"A": "b"}}
        )
        yield folder / "shared"
        ray.shutdown()


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def config(place: Path, **changes: Any) -> Config:
    return tiny.config(run__storage=str(place), **({"cluster__workers": 2} | changes))


def problems_of(settings: Config, base: BaseModel | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check(settings, base)
    return str(caught.value)


def check(settings: Config, base: BaseModel | None = None) -> None:
    cluster = preflight.ask(settings)
    if base is None:
        preflight.require(decide_evaluation(settings, cluster), cluster)
        return
    made = decide(settings, tiny.of_data(settings), base, cluster)
    preflight.require(made.config, cluster, base, made.size, made.expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = project.make_model(tmp_path_factory.mktemp("model"))
    return obtain(tiny.config(model__name=str(folder)))


@pytest.mark.ray
class TestTwoNodes:
    def test_a_node_with_another_version_is_named_with_the_package(self, cluster: Path) -> None:
        here = version("torch")
        assert problems_of(config(cluster)) == (
            f"node 127.0.0.2: has torch 9.9.9, here it is {here}: install the same version on all nodes"
        )

    def test_everything_that_is_wrong_is_in_one_error(self, cluster: Path, base: BaseModel) -> None:
        error = problems_of(
            config(cluster / "own", cluster__gpus_per_worker=1, train__keep=2**31 - 1), base
        )
        workers, versions, storage, disk = (
            error.split("; ")[0],
            *error.split("; ")[2:4],
            error.split("; ")[4],
        )
        assert "cluster.workers=2" in workers
        assert "0 GPUs, 2 nodes" in workers
        assert "torch 9.9.9" in versions
        assert storage.startswith(
            f"node 127.0.0.2: run.storage {cluster / 'own'} is another folder there than here"
        )
        assert "the run needs about" in disk

    def test_nothing_is_left_in_the_storage(self, cluster: Path) -> None:
        problems_of(config(cluster))
        problems_of(config(cluster / "own"))
        assert [entry.name for entry in cluster.rglob("*")] == ["own"]

    def test_a_worker_larger_than_the_nodes_memory(self, cluster: Path, base: BaseModel) -> None:
        error = problems_of(config(cluster, data__max_length=2**31 - 1, train__micro_batch=4), base)
        assert (
            "GiB of memory, so there is room for 0 (node " in error
        )  # Ray may name 127.0.0.1 otherwise

    def test_a_range_of_workers_waits(self, cluster: Path) -> None:
        with said() as lines, refused("torch"):  # nothing else is wrong
            check(config(cluster, cluster__workers=[3, 4]))
        assert lines[0].startswith("training waits for the cluster to grow: cluster.workers=3 ")

    def test_what_the_launcher_may_start_counts(
        self, cluster: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = cluster.parent / "launched"
        home.mkdir()
        kinds = {"head": {}, "cpu": {"resources": {"CPU": 2}, "max_workers": 2}}
        tree = {"max_workers": 2, "head_node_type": "head", "available_node_types": kinds}
        (home / "ray_bootstrap_config.yaml").write_text(str(tree))
        monkeypatch.setenv("HOME", str(home))
        with said() as lines, refused("node 127.0.0.2: has torch"):
            check(config(cluster, cluster__workers=4))
        assert "waits for the cluster to grow" in lines[0]
        assert "can grow to 5" in problems_of(
            config(cluster, cluster__workers=6, train__global_batch=8)
        )


def test_the_launchers_limits_are_those_of_cluster_yaml() -> None:
    kinds = {
        "head": {"resources": {"CPU": 0}},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 9},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 3},
    }
    found = resources.launched(
        {"max_workers": 4, "head_node_type": "head", "available_node_types": kinds}
    )
    assert [(dict(one.resources), one.count) for one in found] == [
        ({"CPU": 4, "GPU": 1}, 3),
        ({"CPU": 8}, 1),
    ]
    assert resources.room({"CPU": 2, "GPU": 0.5}, found) == 6


@pytest.mark.parametrize(
    ("each", "gpus", "fits"),
    [(0.25, 1.0, 4), (0.3333, 2.0, 6), (0.6, 3.0, 3), (0.4, 1.6, 3)],
)
def test_no_part_of_a_gpu_lies_on_two(each: float, gpus: float, fits: int) -> None:
    """A search that counts on one more would wait for it for ever. The last: a worker is there already."""
    node = resources.Nodes({"CPU": 64.0, "GPU": gpus}, 1)
    assert resources.room({"CPU": 1.0, "GPU": each}, [node, node]) == 2 * fits
    assert resources.room({"CPU": each}, [resources.Nodes({"CPU": 2.0}, 1)]) == int(2 / each + 1e-6)


def test_uploads_need_room_in_the_temporary_folder(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.decided(run__storage="s3://b/runs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for trainable, expected in ((10**3, False), (10**15, True)):
        found = list(
            preflight.disk_problems(
                settings, replace(estimate(settings, base, tiny.ON_CPU), trainable=trainable), base
            )
        )
        assert bool(found) is expected
    assert found[0].startswith("run.storage: uploads need about ")
    assert f"in {tmp_path}, " in found[0]


def test_the_tokens_of_other_runs_are_no_room_for_this_one(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.decided(run__storage=str(tmp_path))
    size = replace(estimate(settings, base, tiny.ON_CPU), trainable=10**8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))

    def lies(name: str) -> None:
        (tmp_path / name).mkdir()
        with (tmp_path / name / "file").open("wb") as file:
            file.truncate(2**36)  # without taking them

    lies("tokens")
    (problem,) = preflight.disk_problems(settings, size, base)
    assert "1.00 GiB are free" in problem
    lies(settings.run.name)  # its checkpoints, from before
    assert not list(preflight.disk_problems(settings, size, base))


@pytest.mark.parametrize(
    ("torch", "gpu_memory", "cuda", "expected"),
    [
        ("2.13.0+cu130", 80 * 2**30, (13, 13), None),
        (
            "2.13.0",
            80 * 2**30,
            (12, 13),
            "has an NVIDIA driver for CUDA 12, and torch 2.13.0, which is for CUDA 13",
        ),
        (
            "2.13.0+cpu",
            80 * 2**30,
            (13, None),
            "has GPUs, and torch 2.13.0+cpu, which is for CPUs only: install torch",
        ),
        (
            "2.13.0+cu130",
            None,
            (None, 13),
            "has GPUs that NVIDIA's driver does not show: fix the driver",
        ),
    ],
)
def test_gpus_that_cannot_be_used_are_told_before_a_worker_gets_them(
    torch: str, gpu_memory: int | None, cuda: tuple[int | None, int | None], expected: str | None
) -> None:
    found = preflight.unusable_gpu(NodeInfo({"torch": torch}, 0, gpu_memory, None, None, *cuda))
    assert found == expected if expected is None else found and found.startswith(expected)
    assert expected is None or str(found).endswith("or set cluster.gpus_per_worker=0")


@pytest.mark.parametrize(
    ("here", "there", "library", "told"),
    [
        ({"python": "3.11.7"}, {"python": "3.11.2"}, None, None),
        (
            {"python": "3.11.7"},
            {"python": "3.12.0"},
            None,
            "python 3.12.0, here it is 3.11.7: install",
        ),
        ({"torch": "2.9.0+cpu"}, {"torch": "2.9.0+cu126"}, None, None),
        ({"torch": "2.9.0"}, {"torch": None}, None, "no torch, here it is 2.9.0: install the same"),
        # A node that was not updated ran its own version of what the driver asked for, in silence.
        (
            {"olora_ray": "code 2"},
            {"olora_ray": "code 1"},
            None,
            "olora_ray code 1, here it is code 2: ",
        ),
        ({"olora_ray": "code 2"}, {}, None, "no olora_ray, here it is code 2: "),
        ({"bitsandbytes": "0.50.2"}, {}, None, None),
        ({"bitsandbytes": "0.50.2"}, {}, "bitsandbytes", "no bitsandbytes, here it is 0.50.2: "),
    ],
)
def test_nodes_with_another_version_are_told(
    here: dict[str, str | None],
    there: dict[str, str | None],
    library: str | None,
    told: str | None,
) -> None:
    others = [(name, NodeInfo(there, 0)) for name in "abcde"]
    found = preflight.version_problems(NodeInfo(here, 0), others, library)
    assert len(found) == bool(told)
    assert "".join(found).startswith(f"nodes a, b, c and 2 more: has {told}" if told else "")


def test_other_code_in_the_folder_of_now_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that was updated and not installed: the workers import it, and the script what is installed."""
    monkeypatch.chdir(tmp_path)
    assert preflight.code_problems() == []
    (tmp_path / "olora_ray").symlink_to(node_cache.PACKAGE)
    assert preflight.code_problems() == []
    (tmp_path / "olora_ray").unlink()
    (tmp_path / "olora_ray").mkdir()
    (tmp_path / "olora_ray" / "newer.py").write_text("")
    node_cache.project.cache_clear()
    assert preflight.code_problems() == [], "no package: what is installed is taken"
    (tmp_path / "olora_ray" / "__init__.py").write_text("")
    [line] = preflight.code_problems()
    assert line.startswith(f"{tmp_path}/olora_ray differs from {node_cache.PACKAGE}, ")


def test_each_node_needs_the_same_code_of_the_plugins_that_a_run_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[olora_ray.formats]\ndialogs = my_rows:FORMAT\n"
    plugins.install(monkeypatch, tmp_path, "my-rows", "my_rows", "", entries)
    sources = [{"path": "a", "format": "dialogs"}, {"path": "b", "format": "text"}, "c"]
    config = Config.model_validate({"model": {"name": "m"}, "data": {"train": sources}})
    used = preflight.plugins_in(config)
    assert used == [(FORMATS, "dialogs")]
    here = node_facts.node_info(used)
    assert here.versions["olora_ray"] == f"code {node_cache.project()}"
    assert preflight.version_problems(here, [("a", node_facts.node_info(used))]) == []
    (tmp_path / "my_rows.py").write_text("CHANGED = 1\n")
    changed = node_facts.node_info(used)
    (tmp_path / "my_rows.py").unlink()
    missing = node_facts.node_info(used)
    another, none = preflight.version_problems(here, [("a", changed), ("b", missing)])
    assert another.startswith("node a: has olora_ray.formats:dialogs code ")
    assert none.startswith("node b: has no olora_ray.formats:dialogs, here it is code ")
