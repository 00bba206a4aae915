"""MLflow's logged model of a run: found by loss, settings and data, and linked with its evaluations."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from olora_ray.config.load import override
from olora_ray.evaluation import results, targets
from olora_ray.evaluation.results import EvalResult
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline import publish
from olora_ray.tracking.models import of_run
from olora_ray.tracking.start import start_run
from tests import finished_run
from tests.mlflow_server import Server


@pytest.fixture(params=["sqlite", pytest.param("http", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[finished_run.FinishedRun]:
    address = None
    with ExitStack() as stack:
        if request.param == "http":
            server = Server(tmp_path / "server")
            stack.callback(server.kill)
            server.wait()
            address = server.uri
        yield finished_run.make(tmp_path, tracking={"uri": address})


def test_the_model_of_a_run_is_found_by_its_loss_and_its_evaluations_are_linked_with_it(
    run: finished_run.FinishedRun,
) -> None:
    tracker = start_run(run.config, "test", {})
    run.folder.write_result(publish.publish(run.exported, tracker, {}, {}))
    publish.publish(run.exported, tracker, {}, {})  # an attempt after one that was killed
    client = tracker.client()
    experiment = client.get_run(tracker.run_id).info.experiment_id
    [model] = client.search_logged_models(
        [experiment], "metrics.`eval/loss` < 1.3 AND params.`adapter.rank` = '4'"
    )
    assert not client.search_logged_models([experiment], "metrics.`eval/loss` < 1.2"), (
        "only the exported step counts"
    )
    assert (
        client.search_logged_models([experiment], "model_type = 'llama'")[0].model_id
        == model.model_id
    )
    assert model.params["train.steps"] == str(run.config.train.steps)
    assert [
        (each.step, each.value) for each in client.get_metric_history(tracker.run_id, "eval/loss")
    ] == [
        (0, 2.5),
        (6, 1.25),
    ], "no step twice"
    held_out = run.spec.eval
    [loss] = model.metrics
    inputs = {
        each.dataset.name: each.dataset
        for each in client.get_run(tracker.run_id).inputs.dataset_inputs
    }
    digest = inputs["evaluation"].digest
    assert (loss.key, loss.value, loss.dataset_name, loss.dataset_digest) == (
        "eval/loss",
        1.25,
        "evaluation",
        digest,
    )

    measured = RowResults(held_out.digest, (2, 3), (4.0, 6.0), {}, ((0, 0), (0, 1)))
    registered = f"models:/{run.config.registry.model}/1"
    for number, name in enumerate((registered, run.config.folder()), 1):
        target = targets.resolve(name, override(run.config, {"run.name": "evaluation"}))
        request = results.read_request([name], "")
        results.write_results(request, [EvalResult(target, measured, {})], {}, tracker.uri)
        model = client.get_logged_model(model.model_id)
        values = [
            each
            for each in model.metrics
            if each.key == "eval/loss" and each.dataset_digest == digest
        ]
        assert sorted(each.value for each in values) == [1.25, *[2.0] * number]
        evaluation = client.get_run(max(values, key=lambda each: each.timestamp).run_id)
        assert [each.model_id for each in evaluation.inputs.model_inputs] == [model.model_id]
    assert of_run(tracker.uri, "0" * 32) is None
    assert not tracker.evaluates("m-" + "0" * 32)
