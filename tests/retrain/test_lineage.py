"""What a version says about itself after a retraining, and what the next night says about moves by hand."""

import json
import re
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import load_config
from olora_ray.retrain import decision_run, recipe
from olora_ray.retrain.recipe import AGAINST, CHANGED
from olora_ray.tracking.checksums import BASE, GATE, Version
from pipelines import registry, retrain
from tests import mlflow_database, registered
from tests.refused import refused
from tests.retrain.nightly import Nightly
from tests.tracking.test_signatures import make_keys


@pytest.fixture
def nightly(folder: Path, model: Path) -> Nightly:
    mlflow_database.place(folder / "runs")
    return Nightly(folder, model)


def night(nightly: Nightly, *arguments: str) -> list[tuple[str, str, str | None, str]]:
    """Run a night without a training; return the events that were told: event, version, champion before, reason."""
    file = nightly.folder / "told.json"
    file.unlink(missing_ok=True)
    retrain.main([str(nightly.config), f"notify.command=cat >>{file}; echo >>{file}", *arguments])
    told = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(each["event"], each["version"], each["champion"], each["reason"]) for each in told]


def test_a_champion_that_was_moved_by_hand_is_told_once_with_who_and_why(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    aliases = registered.model(nightly.folder / "runs", "nightly", 2)
    same = recipe.read_inputs(load_config(nightly.config)).fingerprint.tags()
    for number in ("1", "2"):
        for name, text in {
            **same,
            GATE: "passed: better",
            AGAINST: "",
            decision_run.RECORDED: "a run",
        }.items():
            aliases.client.set_model_version_tag("nightly", number, name, text)
    by_hand = ("nightly", "--tracking-uri", aliases.uri)
    aliases.client.set_registered_model_alias("nightly", "champion", "1")
    assert night(nightly) == [], (
        "there is no decision yet with which the champion could be compared"
    )

    monkeypatch.setenv("OLORA_SUBMITTER", "alice@desk")
    registry.main(["promote", by_hand[0], "2", *by_hand[1:]])
    with pytest.raises(UserError):
        night(nightly, "data.eval=[]")  # a night that fails has decided nothing
    ((event, version, before, reason),) = night(nightly)
    assert (event, version, before) == ("moved", "2", "1")
    assert re.search(r"the latest decision left version 1: promoted by hand, .* alice@desk", reason)
    assert night(nightly) == []

    registry.main(["rollback", *by_hand])
    ((event, version, before, reason),) = night(nightly)
    assert (event, version, before) == ("moved", "1", "2")
    assert ": rolled back: by hand, " in reason
    assert night(nightly) == []
    aliases.client.set_registered_model_alias("nightly", "champion", "2")
    aliases.client.set_model_version_tag("nightly", "2", GATE, "passed: better")
    assert night(nightly)[0][3].endswith("left version 1: its alias was set or deleted in MLflow")
    assert night(nightly) == []
    runs = [run.data.tags | {"status": run.info.status} for run in nightly.decisions()]
    failed, *moves = [tags for tags in runs if tags["olora.decision"] != "unchanged"]
    assert (failed["olora.decision"], failed["status"]) == ("failed", "FAILED")
    assert "data.eval: retraining compares" in failed["olora.reason"]
    assert [tags["olora.decision"] for tags in moves] == ["moved"] * 3


def test_a_base_model_that_has_changed_is_named_in_the_message(
    nightly: Nightly, model: Path
) -> None:
    config = load_config(nightly.config)
    inputs = recipe.read_inputs(config)
    before = {**inputs.fingerprint.tags(), "olora.base_digest": "another", BASE: "org/tiny@0a1b2c"}
    _, tags = recipe.training_config(config, inputs, Version("nightly", "1", before))
    expected = f"changed since version 1: base model (org/tiny@0a1b2c is now {model})"
    assert tags[CHANGED] == expected
    aliases = registered.model(nightly.folder / "runs", "nightly", 1)
    aliases.client.set_registered_model_alias("nightly", "champion", "1")
    for name, text in {
        **tags,
        GATE: "passed: eval/loss 0.5",
        AGAINST: "",
        decision_run.RECORDED: "",
    }.items():
        aliases.client.set_model_version_tag("nightly", "1", name, text)
    assert night(nightly) == [("promoted", "1", None, f"eval/loss 0.5; {expected}")]


@pytest.mark.ray
def test_a_version_tells_its_data_base_code_image_who_cost_and_decision(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variables are those that an image and deploy/submit.py set."""
    pytest.importorskip("model_signing")
    nightly, (private, public) = Nightly(folder, model), make_keys(folder / "key")
    image = "registry.example.com/olora-ray@sha256:0123"
    for name, text in {"COMMIT": "c0ffee", "IMAGE": image, "SUBMITTER": "alice@desk"}.items():
        monkeypatch.setenv(f"OLORA_{name}", text)
    verify = f"registry.verify={public}"
    assert "set registry.key, too" in nightly.call(verify, code=2)
    log = nightly.call(f"registry.key=file:{private}", verify)
    at = ["nightly", "1", "--tracking-uri", nightly.aliases.uri]
    registry.main(["verify", *at, "--key", str(public)])
    capsys.readouterr()
    registry.main(["show", *at])
    shown = capsys.readouterr().out
    tags = dict(line.strip().split(" = ", 1) for line in shown.splitlines() if " = " in line)
    assert tags["olora.base"] == str(model)
    assert tags["olora.data_rows"] == "40"
    assert (tags["olora.commit"], tags["olora.image"]) == ("c0ffee", image)
    assert tags["olora.submitted_by"] == "alice@desk"
    assert 0 < int(tags["olora.cpu_seconds"]) < 300, log
    assert tags["olora.gate"].startswith("passed: eval/loss")
    digests = [
        tags[f"olora.{what}"] for what in ("code", "base_digest", "data_digest", "held_out_digest")
    ]
    assert all(re.fullmatch("[0-9a-f+]{12,}", digest) for digest in digests), digests
    run = nightly.aliases.client.get_run(nightly.aliases.version("1").run_id)
    assert run.data.tags["mlflow.source.git.commit"] == "c0ffee"


def written(nightly: Nightly) -> set[Path]:
    """Return the files of the storage, without the digests of files of rows: a night does not read these again."""
    files = {each.relative_to(nightly.folder) for each in nightly.folder.glob("runs/**/*")}
    return {each for each in files if each.parts[1:2] != ("tokens",)}


def test_a_dry_run_says_what_a_night_would_do_and_changes_nothing(
    nightly: Nightly, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*changes: str) -> dict[str, str]:
        before = written(nightly)
        retrain.main([str(nightly.config), "--dry-run", *changes])
        assert written(nightly) == before
        lines = capsys.readouterr().out.splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    first = planned()
    assert first["rows"].startswith("40 in 1 file")
    assert first["time"].startswith("unknown")

    config = load_config(nightly.config)
    inputs = recipe.read_inputs(config)
    recipe.note(config, inputs.plan)
    aliases = registered.model(nightly.folder / "runs", "nightly", 1)
    aliases.promote("1", "by hand")
    for name, text in {**inputs.fingerprint.tags(), recipe.ROWS: "40"}.items():
        aliases.tag_version("1", name, text)
    assert "nothing changed since version 1" in planned()["tonight"]

    nightly.add("1-more", ["three"], 7)
    plan = planned()
    assert plan["rows"].startswith("47 in 2 files")
    assert plan["new"].endswith("1-more.jsonl (7 rows)")
    assert "training data" in plan["tonight"]
    assert "gate.min_rows=20" in plan["gate"]
    with refused("gate.min_rows"):
        planned("gate.min_rows=25")
    assert [version.number for version in aliases.versions()] == ["1"]
    assert aliases.current() == {"champion": "1"}
