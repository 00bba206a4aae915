"""A version's description says in words what it is, and nothing of the machine that trained it."""

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from olora_ray.pipeline import publish
from olora_ray.pipeline.version import describe
from olora_ray.tracking.client import connect
from olora_ray.tracking.models import BaseOfAdapter
from olora_ray.tracking.start import resolve_uri, start_run
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.objectives.objective import perplexity
from tests import finished_run
from tests.finished_run import FinishedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    found = finished_run.make(tmp_path_factory.mktemp("run"))
    assert found.registered({"olora.retrained_from": "base"}) == "1"
    return found


def described(
    run: FinishedRun,
    scores: Any = MappingProxyType({}),
    base: BaseOfAdapter | None = None,
    **of: Any,
) -> str:
    """The description of the run with another `state` at its end."""
    result = replace(run.result, state=of.pop("state", run.result.state))
    return describe(replace(run.exported, result=result), scores, base, Path(run.folder.merged))


def test_the_page_of_a_version(run: FinishedRun) -> None:
    version = connect(resolve_uri(run.config)).get_model_version("small", "1")
    text = version.description
    facts = text.partition("\n\n")[0].splitlines()
    assert facts == [
        line
        for line in (Path(run.folder.merged) / "README.md").read_text().splitlines()
        if line in facts
    ]
    assert facts[0].startswith("- Base model: `model`, with the adapter merged into its weights")
    assert "- Method: olora, rank 4, alpha 8, on all-linear" in facts
    assert "| loss per held-out token | 2.5000 | **1.2500** |" in text
    assert "| exact_match (1 row) | 0.000 | **0.500** |" in text
    assert "- Training: 6 steps of 4 sequences of at most 64 tokens" in facts
    assert "- Training data: 60 rows, " in text
    assert 'mlflow.transformers.load_model("models:/small/1")' in text
    assert str(Path(run.config.run.storage).parent) not in text
    assert version.tags.keys() >= {"olora.base_digest", "olora.checksums", "olora.data_digest"}


def test_the_page_of_the_registered_model_says_what_its_aliases_mean(run: FinishedRun) -> None:
    client = connect(resolve_uri(run.config))
    assert "`champion`: the version in use" in client.get_registered_model("small").description
    client.update_registered_model("small", "by hand")
    run.registered()
    assert client.get_registered_model("small").description == "by hand"


def test_an_adapter_alone_says_what_else_is_needed(run: FinishedRun) -> None:
    folder = "/home/somebody/models/base"
    text = described(run, finished_run.SCORES, BaseOfAdapter(folder, "cafe", folder))
    assert 'load_model("{uri}", base_model_path="FOLDER_OF_THE_BASE")' in text
    assert "`base`" in text
    assert "/home" not in text
    text = described(
        run, finished_run.SCORES, BaseOfAdapter("org/base", "cafe", folder, "0123", True)
    )
    assert "`org/base` at commit `0123`" in text


def test_loss_and_perplexity_of_result_json_are_those_of_the_best_step(run: FinishedRun) -> None:
    losses = {0: 2.0, 2: 1.0, 4: 1.5}
    history = [
        {"step": float(step), "eval/loss": loss, "eval/perplexity": perplexity(loss)}
        for step, loss in losses.items()
    ]
    result = replace(run.result, state=TrainState(4, 1.0, 2, history=history))
    tracker = start_run(run.config, "test", {})
    found = publish.publish(replace(run.exported, result=result), tracker, {}, {})
    assert found["best_step"] == 2
    assert found["eval_loss_before"] == 2.0
    assert found["metrics"]["eval/loss"] == 1.0
    assert found["metrics"]["eval/perplexity"] == pytest.approx(math.e)
