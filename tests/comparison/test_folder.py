"""The folder of a comparison belongs to one comparison, whose settings are fixed once it has begun."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparison import folder
from comparison.arguments import Compare, Comparison
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from tests.comparison import made


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(folder.address, "find", lambda: "local")
    found = made.comparison(tmp_path)
    folder.begin(found, {"test rows": "a", "base model": "b"})
    (Path(found.config.folder()) / "tuning-1").mkdir()
    return found


@pytest.mark.lengthy
def test_the_same_comparison_goes_on(begun: Comparison) -> None:
    folder.check(begun)
    folder.begin(begun, {"test rows": "a", "base model": "b"})
    folder.check(replace(begun, budget=60.0))


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("changes", "compare", "seeds", "methods", "message"),
    [
        ({"train.steps": 50}, {}, 4, ("lora", "olora"), r"1 other setting \(train\.steps was 40, is 50\)"),
        ({}, {"relevant": 0.5}, 4, ("lora", "olora"), r"compare\.relevant was 0\.01, is 0\.5"),
        ({"gate.group": "user"}, {}, 4, ("lora", "olora"), r"gate\.group was None, is 'user'"),
        ({}, {}, 8, ("lora", "olora"), r"--seeds was 4, is 8"),
        ({}, {}, 4, ("olora", "lora"), r"--methods was \['lora', 'olora'\], is"),
    ],
)
def test_what_is_compared_is_fixed_before_it_begins(
    begun: Comparison,
    changes: dict[str, object],
    compare: dict[str, Any],
    seeds: int,
    methods: tuple[str, ...],
    message: str,
) -> None:
    """More seeds after the result is known would be a search for a result that pleases."""
    other = Comparison(override(begun.config, changes), Compare(**compare), methods, tuple(range(4, 4 + seeds)), None)
    with pytest.raises(UserError, match=message):
        folder.check(other)


@pytest.mark.lengthy
def test_until_the_first_trial_settings_and_rows_may_change(begun: Comparison) -> None:
    place = Path(begun.config.folder())
    (place / "tuning-1").rmdir()
    (place / "shared" / "lora").mkdir(parents=True)
    same = {"test rows": "a", "base model": "b"}
    folder.begin(begun, same)
    assert (place / "shared" / "lora").exists()
    other = replace(begun, config=override(begun.config, {"train.steps": 5}))
    folder.check(other)
    folder.begin(other, {**same, "test rows": "other"})
    assert not (place / "shared").exists()
    (place / "tuning-1").mkdir()
    folder.check(other)
    with pytest.raises(UserError, match=r"train\.steps was 5, is 40"):
        folder.check(begun)


@pytest.mark.lengthy
def test_other_rows_and_damage_are_refused(begun: Comparison) -> None:
    with pytest.raises(UserError, match="another test rows"):
        folder.begin(begun, {"test rows": "other", "base model": "b"})
    (Path(begun.config.folder()) / "compare.json").write_text("{")
    with pytest.raises(UserError, match=r"compare\.json: cannot be read; restore it .*, or delete "):
        folder.check(begun)
