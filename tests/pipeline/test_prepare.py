"""The plan of a run refuses what its objective does not measure, before anything is prepared."""

from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.pipeline import prepare
from tests import example_objective, tiny


def test_a_gate_on_the_perplexity_of_an_objective_without_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with example_objective.installed(monkeypatch, tmp_path):
        config = tiny.config(train__objective="examples", gate__metric="eval/perplexity")
        with pytest.raises(UserError) as error:
            prepare.check_settings(config)
    assert str(error.value).startswith("gate: metric eval/perplexity")


@pytest.mark.parametrize("field", ["data__train", "data__eval"])
def test_rows_from_which_the_objective_cannot_learn_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str
) -> None:
    rows = {"path": "rows.txt", "format": "text"}
    with example_objective.installed(monkeypatch, tmp_path):
        config = tiny.config(train__objective="examples", **{field: [rows]})
        with pytest.raises(UserError) as error:
            prepare.check_settings(config)
    assert str(error.value).startswith(f"{field.replace('__', '.')}.0.format: ")
