import random
from dataclasses import replace

import optuna
import pytest

from olora_ray.sweep.report import importance
from tests.sweep.odd import ODD, search
from tests.sweep.searches import realistic


def test_the_field_that_decides_is_the_most_important() -> None:
    rng = random.Random(0)
    rows = []
    for _ in range(30):
        params = {"a.noise": rng.random(), "a.decides": 10 ** rng.uniform(-5, -2), "a.word": rng.choice("xyz")}
        rows.append((params, abs(params["a.decides"] - 1e-3) ** 0.5))  # type: ignore[operator]
    found = importance.of(search(rows))
    assert found.order()[0] == "a.decides"
    assert found.shares[0][1] > 0.7
    assert sum(share for _, share in found.shares) == pytest.approx(1)
    assert importance.of(search(rows)) == found


def test_fields_that_move_together_share_one_importance_though_the_default_breaks_the_rule() -> None:
    record = realistic()
    groups = [fields for fields, _ in importance.of(record).shares]
    assert ("adapter.rank", "adapter.alpha") in groups
    assert record.trials[0].params["adapter.alpha"] != 2 * record.trials[0].params["adapter.rank"]


def test_failed_trials_are_left_out_and_stopped_ones_are_not() -> None:
    record = realistic()
    ended = [trial for trial in record.trials if trial.status in ("finished", "stopped")]
    assert importance.of(record).trials == len(ended) == 11


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one trial", "too few trials"),
        ("all failed", "too few trials"),
        ("equal values", "same value"),
        ("equal parameters", "one value only"),
        ("no trials", "too few trials"),
    ],
)
def test_it_says_why_there_is_none(name: str, why: str) -> None:
    found = importance.of(ODD[name])
    assert why in found.why_not
    assert not found.shares


def test_one_diverged_trial_does_not_decide_alone() -> None:
    """With plain values the field that only the diverged trial sets would take all."""
    record = realistic(40)
    worse = replace(record.trials[3], value=1e12)
    changed = replace(record, trials=(*record.trials[:3], worse, *record.trials[4:]))
    assert importance.of(changed).order()[0] == "train.lr"


def test_the_verbosity_of_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    importance.of(realistic())
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""
