"""From a name in the registry to checked files."""

import json
import shutil
from pathlib import Path

import pytest

from olora_ray.tracking import models, run
from olora_ray.tracking.models import Contents
from tests.refused import refused
from tests.said import said


def test_a_registered_model_as_a_base_model(
    triage: run.Tracker, merged: Path, tmp_path: Path
) -> None:
    folder = models.find("models:/triage@candidate", triage.uri, tmp_path).folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in merged.iterdir()
    )
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert list(tmp_path.iterdir()) == [], "local artifacts are used where they lie"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/triage@nobody", "aliases @candidate = 1"),
        ("models:/nothing@candidate", "no model 'nothing' is registered"),
        ("models:/triage", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_a_registered_model_that_is_not_there(
    triage: run.Tracker, tmp_path: Path, name: str, message: str
) -> None:
    with refused(message):
        models.find(name, triage.uri, tmp_path)


def test_a_version_that_is_no_transformers_model(tracker: run.Tracker, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_text("")
    tracker.client().create_registered_model("sklearn")
    tracker.client().create_model_version("sklearn", str(tmp_path))
    with refused("has no config.json"):
        models.find("models:/sklearn/1", tracker.uri, tmp_path)


def test_artifacts_elsewhere_are_downloaded_once_and_checked_each_time(
    triage: run.Tracker, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.artifacts

    fetched = []
    client = triage.client()
    source = Path(client.get_model_version("triage", "1").source)

    def download(artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        fetched.append((artifact_uri, tracking_uri))
        shutil.copytree(source, Path(dst_path) / "artifacts")
        return f"{dst_path}/artifacts"

    monkeypatch.setattr(client, "get_model_version_download_uri", lambda *_: "s3://bucket/model")
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    folders = {models.find("models:/triage/1", triage.uri, tmp_path).folder for _ in range(2)}
    assert fetched == [("s3://bucket/model", triage.uri)]
    (folder,) = folders
    assert not list(tmp_path.rglob("*.tmp"))
    (folder / "adapter_config.json").write_text("{}")
    assert models.find("models:/triage/1", triage.uri, tmp_path).folder == folder
    assert len(fetched) == 2, "a copy that is damaged is fetched again"
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["model/adapter_config.json", "model/chat_template.jinja"])
def test_a_version_with_added_or_changed_files_is_not_loaded(
    tracker: run.Tracker, merged: Path, name: str
) -> None:
    version = models.register(tracker, Contents(merged), "spoilt", "candidate", {})
    uri = f"models:/spoilt/{version}"
    file = models.find(uri, tracker.uri, merged.parent).folder.parent / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with refused(f"spoilt version {version}: {name}"):
        models.find(uri, tracker.uri, merged.parent)


def test_a_version_of_others_is_loaded_with_a_warning(tracker: run.Tracker, merged: Path) -> None:
    tracker.client().create_registered_model("others")
    tracker.client().create_model_version("others", str(merged))
    with said() as lines:
        assert models.find("models:/others/1", tracker.uri, merged.parent).folder == merged
    assert "its files are not checked" in "".join(lines)
