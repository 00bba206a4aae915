"""Decisions in a real MLflow: each is written once, even after an interruption."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.schema import Config
from olora_ray.retrain import decision_run
from olora_ray.retrain.decision_run import Entry
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking import run as tracking
from olora_ray.tracking.checksums import GATE, Version
from olora_ray.tracking.client import connect
from olora_ray.tracking.start import resolve_uri, start_run
from tests import mlflow_database, tiny

DETAILS = {
    "challenger": {"eval/loss": 1.0},
    "champion": {"eval/loss": 1.5},
    "improvement": {"mean": 0.5, "low": 0.25, "high": 0.75},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    storage = str(mlflow_database.place(tmp_path_factory.mktemp("record")))
    return tiny.config(
        run__storage=storage, tracking__uri=f"sqlite:///{storage}/mlflow.db", registry__model="m"
    )


@pytest.fixture(scope="module")
def add(config: Config) -> Callable[..., Version]:
    """Create a version with tags, without files."""
    start_run(config, "other", {}).end()
    client = connect(resolve_uri(config))
    client.create_registered_model("m")

    def version(**tags: str) -> Version:
        both = {
            AGAINST: "1",
            decision_run.DETAILS: json.dumps(DETAILS),
            decision_run.RECORDED: "",
            **tags,
        }
        return Version.of(client.create_model_version("m", "/nowhere", tags=both))

    return version


def runs(config: Config, version: Version) -> list[Any]:
    client = connect(resolve_uri(config))
    experiment = client.get_experiment_by_name("olora").experiment_id
    return list(client.search_runs([experiment], f"tags.`olora.challenger` = 'm/{version.number}'"))


def again(config: Config, version: Version) -> Version:
    return Version.of(connect(resolve_uri(config)).get_model_version("m", version.number))


def test_a_verdict_is_recorded_once_with_its_numbers(
    config: Config, add: Callable[..., Version]
) -> None:
    version = add(**{GATE: "refused: eval/loss: worse"})
    decision_run.of_version(config, version)
    decision_run.of_version(config, again(config, version))
    (run,) = runs(config, version)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["olora.decision"], run.data.tags["olora.reason"]) == (
        "refused",
        "eval/loss: worse",
    )
    assert run.data.tags["olora.champion"] == "m/1"
    assert run.data.tags["olora.interval"] == "0.500000 [0.250000, 0.750000]"
    assert run.data.metrics["improvement/low"] == 0.25
    assert run.data.metrics["champion/eval/loss"] == 1.5
    assert f"#/models/m/versions/{version.number}" in run.data.tags["mlflow.note.content"]


def test_a_record_that_was_cut_off_is_written_again(
    config: Config, add: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add(**{GATE: "passed: better"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracker, "text", killed)
        with pytest.raises(KeyboardInterrupt):
            decision_run.of_version(config, version)
    decision_run.of_version(config, again(config, version))
    run, _ = runs(config, version)  # the newest first
    assert (run.info.status, run.data.tags["olora.decision"]) == ("FINISHED", "promoted")
    assert Path(run.info.artifact_uri, "decision.json").is_file()


def test_calls_that_find_nothing_share_a_run_until_something_else_is_said(config: Config) -> None:
    client = connect(resolve_uri(config))

    def latest() -> list[dict[str, str]]:
        experiment = client.get_experiment_by_name("olora").experiment_id
        found = client.search_runs(
            [experiment], "tags.`olora.champion` = 'm/99'", order_by=["start_time ASC"]
        )
        return [run.data.tags for run in found]

    nothing = Entry(
        "unchanged", 'nothing changed since version 99 of m (it\'s "good")', champion="99"
    )
    for _ in range(3):
        decision_run.unchanged(config, nothing)
    (tags,) = latest()
    assert tags["olora.decision"] == "unchanged"
    decision_run.write_decision(config, Entry("failed", "no such file", champion="99"))
    decision_run.unchanged(config, nothing)
    decision_run.unchanged(config, replace(nothing, reason="nothing changed since version 98"))
    assert [tags["olora.decision"] for tags in latest()] == [
        "unchanged",
        "failed",
        "unchanged",
        "unchanged",
    ]
