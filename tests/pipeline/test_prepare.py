"""The plan of a run refuses what its objective does not measure, before anything is prepared."""

from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import prepare
from tests import example_objective, tiny


def test_a_gate_on_the_perplexity_of_an_objective_without_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with example_objective.installed(monkeypatch, tmp_path):
        config = tiny.config(train__objective="examples", gate__metric="eval/perplexity")
        with pytest.raises(UserError) as error:
            prepare.plan(config, BaseModel("m", str(tmp_path), ""))
    assert str(error.value).startswith("gate: metric eval/perplexity")
