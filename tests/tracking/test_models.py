import json
import shutil
from pathlib import Path

import pytest
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from olora_ray.common.node_cache import project
from olora_ray.common.storage import digest
from olora_ray.tracking import checksums, models, run
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import GATE
from olora_ray.tracking.models import Contents
from olora_ray.tracking.start import CODE, lineage, start_run
from tests import tiny
from tests.tracking.conftest import TAGS

QUESTION = [{"role": "user", "content": "hello"}]


@pytest.fixture
def mlflow_there(triage: run.Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", triage.uri)


def test_the_version_has_alias_tags_run_and_model(triage: run.Tracker) -> None:
    version = triage.client().get_model_version_by_alias("triage", "candidate")
    assert version.run_id == triage.run_id
    text = (Path(version.source) / checksums.FILE).read_text()
    shown = {name: str(value) for name, value in TAGS.items() if value != ""}
    assert version.tags == shown | {checksums.TAG: digest(text)} | lineage()
    assert version.tags[CODE] == project()
    (output,) = triage.client().get_run(triage.run_id).outputs.model_outputs
    model = triage.client().get_logged_model(output.model_id)
    assert str(model.status) == "READY"
    assert model.artifact_location == version.source
    (there,) = json.loads(
        model.tags[MLFLOW_MODEL_VERSIONS]
    )  # without it the model's page says "Not registered"
    assert (there["name"], int(there["version"])) == ("triage", 1)


@pytest.mark.usefixtures("mlflow_there")
def test_mlflow_serves_it_as_a_chat_model() -> None:
    import mlflow.pyfunc
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    # The code that `mlflow models serve` runs, in this process.
    model = mlflow.pyfunc.load_model("models:/triage@candidate")
    request = {"messages": QUESTION, "max_tokens": 4}
    with TestClient(init(model)) as client:
        reply = client.post("/invocations", json=request)
    assert reply.status_code == 200, reply.text
    found = reply.json()[0]
    assert found["object"] == "chat.completion"
    assert found["model"] == "org/base"
    assert found["usage"]["completion_tokens"] <= 4
    assert found["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.usefixtures("mlflow_there")
def test_the_requirements_are_those_of_serving(triage: run.Tracker) -> None:
    import mlflow.pyfunc

    needed = (
        Path(mlflow.pyfunc.get_model_dependencies("models:/triage@candidate")).read_text().split()
    )
    assert [line.partition("==")[0] for line in needed] == ["mlflow", "torch", "transformers"]
    assert not any("+" in line for line in needed), "no local version that an index does not have"


def test_one_copy_of_the_weights(triage: run.Tracker, merged: Path, database: Path) -> None:
    (copy,) = list(database.rglob("*.safetensors"))
    assert copy.read_bytes() == (merged / "model.safetensors").read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o644


def test_registering_again_gives_the_same_version(triage: run.Tracker, merged: Path) -> None:
    client = triage.client()
    client.delete_registered_model_alias("triage", "candidate")  # as if killed before setting it
    assert models.register(triage, Contents(merged), "triage", "candidate", TAGS) == 1
    assert client.get_model_version_by_alias("triage", "candidate").version in ("1", 1)
    assert len(client.search_model_versions("name = 'triage'")) == 1


def test_a_run_that_was_made_longer_has_a_version_of_each_length(
    tracker: run.Tracker, merged: Path
) -> None:
    numbers = [
        models.register(
            tracker, Contents(merged), "longer", "candidate", {checksums.SETTINGS: settings}
        )
        for settings in ("six steps", "six steps", "ten steps", "ten steps")
    ]
    assert numbers == [1, 1, 2, 2]
    aliases = Aliases(tracker.uri, "longer")
    assert aliases.current() == {"candidate": "2"}
    assert len({aliases.files_uri(number) for number in "12"}) == 2
    assert [aliases.version(number).tags[checksums.SETTINGS] for number in "12"] == [
        "six steps",
        "ten steps",
    ]


def test_a_copy_that_was_interrupted_is_filled_again(
    tracker: run.Tracker, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            models.register(tracker, Contents(merged), "other", "candidate", TAGS)
    version = models.register(tracker, Contents(merged), "other", "candidate", TAGS)
    experiment = tracker.client().get_run(tracker.run_id).info.experiment_id
    logged = tracker.client().search_logged_models(
        [experiment], f"source_run_id = '{tracker.run_id}'"
    )
    assert [str(item.status) for item in logged] == ["READY"]
    assert (
        Path(tracker.client().get_model_version("other", str(version)).source) / "MLmodel"
    ).is_file()


def another_run(database: Path) -> run.Tracker:
    return start_run(tiny.config(run__storage=str(database)), "test", {})


def test_registering_again_undoes_no_rollback_and_pushes_out_no_newer_version(
    tracker: run.Tracker, database: Path, merged: Path
) -> None:
    first, second = tracker, another_run(database)
    aliases = Aliases(tracker.uri, "again")
    for one in (first, second):
        models.register(one, Contents(merged), "again", "champion", TAGS)
    assert models.register(first, Contents(merged), "again", "champion", TAGS) == 1
    assert aliases.current() == {"champion": "2", "previous": "1"}, "the newer champion stays"
    aliases.rollback("bad")
    assert models.register(second, Contents(merged), "again", "champion", TAGS) == 2
    assert aliases.current() == {"champion": "1"}, "the rollback stands"
    assert aliases.version("2").tags[GATE] == "rolled back: bad"


def test_a_base_model_without_a_chat_template_completes(
    tracker: run.Tracker, merged: Path, tmp_path: Path
) -> None:
    import mlflow.pyfunc

    plain = shutil.copytree(merged, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    model = mlflow.pyfunc.load_model(
        _folder_of(tracker, models.log_model(tracker, Contents(plain), {}))
    )
    (answer,) = model.predict({"prompt": "hello", "max_tokens": 4})
    assert answer["object"] == "text_completion"


def _folder_of(tracker: run.Tracker, model_id: str) -> str:
    return str(tracker.client().get_logged_model(model_id).artifact_location)
