"""The whole pipeline with data, model and run.storage on s3://: killed, resumed, and the same as on a local disk."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common import storage
from olora_ray.tracking.aliases import Aliases
from tests.pipelines import project
from tests.recovery import processes, runs
from tests.recovery.runs import EndState, Fault, Run
from tests.s3_server import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STAGES = {
    "preparation": Fault("shard"),
    "early step": Fault("step", step=1, rank=0),
    "checkpoint": Fault("checkpoint", step=6),
    "export": Fault("export"),
}
"""Where everything is killed at once."""
ADAPTER = "export/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl (60 rows) and eval.jsonl (7 rows)."""
    return project.make_tiny(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def local(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> EndState:
    """The run that nobody touched, on a local disk."""
    return runs.run_clean(tiny_project, tmp_path_factory.mktemp("local"))


@pytest.fixture
def remote(bucket: str, tiny_project: Path, tmp_path: Path) -> dict[str, Any]:
    """The fields that put model, data and storage of a config in the bucket."""
    return project.on_s3(tiny_project, bucket, tmp_path / "mlflow.db")


def killed_and_resumed(
    tiny_project: Path, folder: Path, remote: dict[str, Any], fault: Fault
) -> None:
    """Kill everything at a point, and give the command again."""
    with processes.scratch() as scratch:
        config = runs.written(tiny_project, folder, **remote)
        run = Run(
            config, scratch, fault, extra={"HOME": str(scratch)}
        )  # its cache of models is empty
        run.start()
        run.wait_for_fault()
        run.kill_everything()
        assert run.wait() == -9, run.tail()
        assert run.attempt() == 0, run.tail()
        left = [path.name for path in (scratch / "t").iterdir() if path.name.startswith("olora-")]
        assert len(left) <= 2, left  # of the attempt that was killed: a checkpoint, the exports


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_on_s3_that_is_killed_ends_as_an_untouched_one_on_a_disk(
    stage: str,
    local: EndState,
    tiny_project: Path,
    remote: dict[str, Any],
    tmp_path: Path,
    s3_server: Server,
) -> None:
    killed_and_resumed(tiny_project, tmp_path, remote, STAGES[stage])
    place = f"{remote['run__storage']}/small"
    assert storage.read_bytes(f"{place}/{ADAPTER}") == local.adapter
    result = json.loads(storage.read_text(f"{place}/result.json"))
    assert result["metrics"]["eval/loss"] == local.result["metrics"]["eval/loss"]
    assert result["registered"]["version"] == 1
    assert storage.names(f"{place}/checkpoints")[-2:] == ["step-0000006", "step-0000008"]


def command(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """An entry script; its temporary files and its cache lie in `folder`, where nothing may be left."""
    for name in ("t", "home"):
        (folder / name).mkdir(exist_ok=True)
    env = {"TMPDIR": str(folder / "t"), "HOME": str(folder / "home"), "RAY_TMPDIR": str(folder)}
    done = project.run_script(script, *arguments, env=env, code=0)
    assert [
        path.name for path in (folder / "t").iterdir() if path.name.startswith(("olora-", "tmp"))
    ] == []
    return done


class TestAfterwards:
    """Evaluation, search and retraining of what lies on s3, each beside the same on a local disk."""

    @pytest.fixture
    def scratch(self) -> Iterator[Path]:
        with processes.scratch() as found:
            yield found

    def configs(
        self, tiny_project: Path, folder: Path, remote: dict[str, Any], **changes: Any
    ) -> dict[str, Path]:
        found = {}
        for name, fields in (("local", {}), ("s3", remote)):
            (folder / name).mkdir()
            found[name] = runs.written(tiny_project, folder / name, **fields, **changes)
        return found

    def test_retrained(
        self, tiny_project: Path, remote: dict[str, Any], scratch: Path, tmp_path: Path
    ) -> None:
        """Trained, then nothing changed, then new rows: the same versions and verdicts as on a local disk."""
        root = remote["run__storage"].removesuffix("/runs")
        train = {"local": f"{tmp_path}/data", "s3": f"{root}/data"}
        lines, weights = {}, {}
        for name, place in train.items():
            storage.write_bytes(f"{place}/0.jsonl", (tiny_project / "train.jsonl").read_bytes())
            data = {
                "train": [{"path": place}],
                "eval": [{"path": str(tiny_project / "eval.jsonl")}],
                "max_length": 64,
            }
            fields = {
                **(remote if name == "s3" else {}),
                "data": data,
                "registry": {"model": "nightly"},
                "gate": {"min_rows": 5},
            }
            (tmp_path / name).mkdir()
            config = str(runs.written(tiny_project, tmp_path / name, **fields))
            first = command("retrain.py", config, folder=scratch).stdout
            again = command("retrain.py", config, folder=scratch).stdout
            assert "nothing changed since version 1" in again
            more = project.make_corpus(tmp_path / f"more-{name}.jsonl", 20, first=200)
            storage.write_bytes(f"{place}/1.jsonl", more.read_bytes())
            second = command("retrain.py", config, folder=scratch).stdout
            lines[name] = [_verdict(text) for text in (first, second)]
            uri = (
                f"sqlite:///{tmp_path}/mlflow.db"
                if name == "s3"
                else f"sqlite:///{tmp_path}/local/runs/mlflow.db"
            )
            versions = Aliases(uri, "nightly").versions()
            assert sorted(version.number for version in versions) == ["1", "2"]
            folders = [version.tags["olora.run_folder"] for version in versions]
            weights[name] = sorted(storage.read_bytes(f"{folder}/{ADAPTER}") for folder in folders)
        assert lines["local"] == lines["s3"]
        assert weights["local"] == weights["s3"]


def _verdict(text: str) -> list[str]:
    kinds = ("passed: ", "refused: ")
    return [
        line.partition(" ")[2]
        for line in text.splitlines()
        if line.partition(" ")[2].startswith(kinds)
    ]
