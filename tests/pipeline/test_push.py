"""export.push with the hub's own client, against a stand-in of the hub."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import RunFolder
from tests import finished_run, hub_stand_in, tiny
from tests.hub_stand_in import TOKEN, Hub
from tests.refused import refused
from tests.said import said

REPO = "acme/small"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a finished run."""
    folder = tmp_path_factory.mktemp("done")
    return finished_run.make(folder, export={"push": REPO, "license": "apache-2.0"}).config


@pytest.fixture
def config(done: Config, tmp_path: Path) -> Config:
    """The same with a copy of its storage."""
    return override(
        done, {"run.storage": str(shutil.copytree(done.run.storage, tmp_path / "runs"))}
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in.running() as found:
        yield found


def result(config: Config) -> dict[str, str]:
    found: dict[str, str] = json.loads(Path(RunFolder(config.folder()).result).read_text())
    return found


def content(file: Path) -> bytes:
    """As the stand-in keeps it."""
    whole = file.read_bytes()
    return hashlib.sha256(whole).hexdigest().encode() if hub_stand_in.is_large(file.name) else whole


def exported(folder: str) -> dict[str, bytes]:
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): content(file) for file in files}


@pytest.mark.parametrize("xet", [True, False])
def test_a_finished_run_is_pushed_once(config: Config, tmp_path: Path, xet: bool) -> None:
    folder = RunFolder(config.folder())
    with hub_stand_in.running(str(tmp_path / "xet") if xet else "") as hub, said() as lines:
        publish.push(config)
        assert f"pushed: {hub.url}/{REPO}/commit/1" in lines
        assert [each["visibility"] for each in hub.created] == ["private"]
        assert hub.repos[REPO] == {".gitattributes": b"", **exported(folder.merged)}
        assert bool(hub.large) != xet
        card = hub.repos[REPO]["README.md"].decode()
        assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
        assert f'from_pretrained("{REPO}")' in card
        requests = len(hub.requests)
        publish.push(config)
        assert len(hub.requests) == requests
        # After a crash between push and note: the hub has all, so no commit is made.
        folder.write_result({**result(config), "pushed": None})
        publish.push(config)
        assert len(hub.commits) == 1
        assert len(hub.large) == (not xet)
    assert not [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and TOKEN.encode() in file.read_bytes()
    ]


def test_an_adapter_takes_the_place_of_a_merged_model_and_other_files_stay(
    config: Config, hub: Hub
) -> None:
    folder = RunFolder(config.folder())
    shutil.rmtree(folder.merged)  # as export.merged=false leaves it
    hub.repos[REPO] = {"model-00001-of-00002.safetensors": b"1", "notes.md": b"mine"}
    publish.push(config)
    assert hub.created == []
    assert "-model-00001-of-00002.safetensors" in hub.commits[0]
    assert hub.repos[REPO] == {"notes.md": b"mine", **exported(folder.adapter)}
    assert "library_name: peft" in hub.repos[REPO]["README.md"].decode()


def problem_of(repo: str) -> str:
    with pytest.raises(UserError) as caught:
        publish.check_hub(repo)
    return str(caught.value)


@pytest.mark.parametrize(
    ("repo", "role", "told"),
    [
        ("acme/a--b", "write", "Cannot have -- or .. in repo_id"),
        (
            "acme/a",
            "read",
            "the hub's token here may only read",
        ),
        ("guests/a", "write", "the hub's token here writes only for ann, acme; set HF_TOKEN"),
        ("acme/a", "write", ""),
        ("else/a", "fineGrained", ""),
    ],
)
def test_what_may_not_be_pushed_is_told_before_the_training(
    hub: Hub, repo: str, role: str, told: str
) -> None:
    hub.role = role
    if told:
        assert problem_of(repo).startswith(f"export.push: {repo}: {told}")
    else:
        publish.check_hub(repo)
    assert hub.created == []
    assert hub.requests.count("/api/whoami-v2") <= 1


def test_a_missing_token_or_hub_is_told_before_the_training(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses it (Invalid user token. The token from HF_TOKEN" in problem_of("acme/a")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "there is no token" in problem_of("acme/a")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with refused("export.push", TryAgain):
            publish.check_hub("acme/a")


def test_a_license_that_nobody_names_is_told_before_the_training(tmp_path: Path) -> None:
    base = BaseModel("org/base", str(tmp_path), "")
    with refused("export.license"):
        publish.check_license(tiny.config(export__push="acme/a"), base)
    publish.check_license(tiny.config(), base)
    publish.check_license(tiny.config(export__push="acme/a", export__license="mit"), base)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    publish.check_license(tiny.config(export__push="acme/a"), base)
