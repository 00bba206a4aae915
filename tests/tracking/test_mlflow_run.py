"""The MLflow run around a piece of work, in a real database."""

from pathlib import Path

import pytest
from mlflow.entities import LoggedModelOutput

from olora_ray.common.errors import Stopped, TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import mlflow_run
from tests import mlflow_database, tiny
from tests.refused import refused


class Ids(dict[str, str]):
    """The MLflow runs of one piece of work."""

    def tracking_run(self, uri: str, storage_root: str) -> str | None:
        return self.get(uri)

    def keep_tracking_run(self, uri: str, storage_root: str, run_id: str) -> None:
        self[uri] = run_id


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    storage: Path = tmp_path_factory.mktemp("runs")
    return tiny.config(run__storage=str(storage), tracking__uri=f"sqlite:///{storage}/mlflow.db")


def status(tracker: Tracker) -> str:
    return str(tracker.client().get_run(tracker.run_id).info.status)


def test_the_next_attempt_resumes_the_run(config: Config) -> None:
    ids = Ids()
    with mlflow_run(config, {"a": "b"}, ids, {"x": 1}, parent="above") as first:
        assert first.flush(20)
        assert status(first) == "RUNNING"
    assert status(first) == "FINISHED"
    with mlflow_run(config, {}, ids, {}) as second:
        assert second.run_id == first.run_id == ids[first.uri]
        assert status(second) == "RUNNING"
    found = second.client().get_run(second.run_id)
    assert found.info.run_name == config.run.name
    assert found.data.params == {"x": "1"}
    assert (found.data.tags["a"], found.data.tags["mlflow.parentRunId"]) == ("b", "above")


@pytest.mark.parametrize(
    ("error", "after_error", "expected"),
    [
        (ValueError("broken"), "FAILED", "FAILED"),
        (Stopped("enough", 143), "FAILED", "KILLED"),
        (TakenOver("another driver works on it", 75), "FAILED", "RUNNING"),
    ],
)
def test_an_end_before_the_end_is_told(
    config: Config, error: BaseException, after_error: str, expected: str
) -> None:
    with (
        pytest.raises(type(error)) as caught,
        mlflow_run(config, {}, Ids(), {}, after_error=after_error) as tracker,  # type: ignore[arg-type]
    ):
        raise error
    assert caught.value is error
    assert status(tracker) == expected


def delete_and_write(tracker: Tracker, experiment: bool) -> None:
    client = tracker.client()
    if experiment:
        client.delete_experiment(client.get_run(tracker.run_id).info.experiment_id)
    else:
        client.delete_run(tracker.run_id)
    client.log_outputs(tracker.run_id, [LoggedModelOutput("m-1", step=0)])


@pytest.mark.parametrize("experiment", [False, True])
def test_a_run_that_somebody_deletes_is_one_line_and_the_next_attempt_has_a_new_one(
    tmp_path: Path, experiment: bool
) -> None:
    """MLflow refuses the model of a deleted run, which shows only after the training."""
    config = tiny.config(run__storage=str(mlflow_database.place(tmp_path)))
    ids = Ids()
    with (
        refused("was deleted during this run", TryAgain) as caught,
        mlflow_run(config, {}, ids, {}) as tracker,
    ):
        delete_and_write(tracker, experiment)
    assert caught.value.exit_code == 75
    if experiment:
        with (
            refused("tracking.experiment"),
            mlflow_run(config, {}, ids, {}),
        ):
            pass
    else:
        with mlflow_run(config, {}, ids, {}) as again:
            assert again.run_id != tracker.run_id
