"""The folder of a comparison belongs to one comparison, whose settings are fixed once it has begun."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparison import folder
from comparison.arguments import Arm, Compare, Comparison
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from tests.contrib.comparison import made


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    found = made.comparison(tmp_path)
    folder.begin(found, {"test rows": "a", "base model": "b"})
    (Path(found.config.folder()) / "tuning" / "trials").mkdir(parents=True)
    return found


def test_the_same_comparison_goes_on(begun: Comparison) -> None:
    folder.check(begun)
    folder.begin(begun, {"test rows": "a", "base model": "b"})


OTHER = made.arm("olora", adapter__method="olora", adapter__rank=8)


@pytest.mark.parametrize(
    ("changes", "compare", "seeds", "arms", "message"),
    [
        (
            {"train.steps": 50},
            {},
            4,
            (made.LORA, made.OLORA),
            r"1 other setting \(train\.steps was 40, is 50\)",
        ),
        (
            {},
            {"relevant": 0.5},
            4,
            (made.LORA, made.OLORA),
            r"compare\.relevant was 0\.01, is 0\.5",
        ),
        (
            {"gate.group": "user"},
            {},
            4,
            (made.LORA, made.OLORA),
            r"gate\.group was None, is 'user'",
        ),
        ({}, {}, 3, (made.LORA, made.OLORA), r"--seeds was 4, is 3"),
        ({}, {}, 4, (made.LORA, OTHER), r"arm olora was "),
    ],
)
def test_what_is_compared_is_fixed_before_it_begins(
    begun: Comparison,
    changes: dict[str, object],
    compare: dict[str, Any],
    seeds: int,
    arms: tuple[Arm, ...],
    message: str,
) -> None:
    other = replace(
        begun, config=override(begun.config, changes), compare=Compare(**compare), arms=arms
    )
    with pytest.raises(UserError, match=message):
        folder.check(replace(other, seeds=tuple(range(4, 4 + seeds))))


def test_seeds_and_arms_may_be_added_and_stay(begun: Comparison) -> None:
    contents = {"test rows": "a", "base model": "b"}
    more = replace(
        begun, seeds=(*begun.seeds, 8), arms=(*begun.arms, made.arm("r8", adapter__rank=8))
    )
    folder.check(more)
    folder.begin(more, contents)
    with pytest.raises(UserError, match=r"--seeds was 5, is 4"):
        folder.check(begun)


def test_other_rows_and_damage_are_refused(begun: Comparison) -> None:
    with pytest.raises(UserError, match="another test rows"):
        folder.begin(begun, {"test rows": "other", "base model": "b"})
    (Path(begun.config.folder()) / "compare.json").write_text("{")
    with pytest.raises(
        UserError, match=r"compare\.json: cannot be read; restore it .*, or delete "
    ):
        folder.check(begun)
