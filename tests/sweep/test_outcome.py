"""The report and the log lines of a search, from the files of its trials."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.sweep import outcome, run, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.report import text
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import SweepSpec, trial_name
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.refused import refused
from tests.said import said
from tests.sweep.searches import realistic

SPACE = Space.model_validate(
    {
        "search": {
            "adapter.rank": {"choice": [8, 16, 32, 64]},
            "train.lr": {"loguniform": [1e-5, 1e-2]},
        },
        "trials": 2000,
        "metric": "train/loss",
    }
)


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Any, Any]:
    """The files of a search that has ended, and the arguments of run.run: (spec, tracker)."""
    config = override(tiny.config(), {"run.storage": str(tmp_path)})
    folder = Path(config.folder())
    folder.mkdir()
    search_folder.keep(str(folder), Progress(318.0, complete=True))
    return SimpleNamespace(config=config), SimpleNamespace(run_id="parent")


def keep(config: Config, *trials: TrialRecord) -> None:
    """Write the records as the trials do."""
    for trial in trials:
        place = Path(config.folder(), "trials", trial_name(trial.number), "trial.json")
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(asdict(trial)))


def trial(number: int, value: float | None, **changes: Any) -> TrialRecord:
    curve = () if value is None else ((4, value),)
    params = {"adapter.rank": 8, "train.lr": 1e-3}
    made = TrialRecord(number, params, "finished", value, step=8, total=8, curve=curve, seconds=9.0)
    return replace(made, **changes)


def test_a_search_that_has_ended_is_reported_with_the_seconds_that_it_took(
    ended: tuple[Any, Any],
) -> None:
    """Regression: the report had 0 seconds, and Ray Tune started although nothing was left to do."""
    spec, tracker = ended
    keep(spec.config, trial(0, 1.0), trial(1, 0.5))
    with said() as lines:
        _, found = run.run(spec, SPACE, 0.0, tracker, {})
    assert lines == ["search: already complete; no trial runs, the report is written again"]
    assert found.seconds == 318.0
    assert dict(text.facts(found))["trials"] == "2 in 5 min 18 s: 2 finished"


def test_trials_say_what_has_cut_them(ended: tuple[Any, Any]) -> None:
    spec, tracker = ended
    folder = spec.config.folder()
    early = {"status": "stopped", "step": 4}
    keep(
        spec.config,
        trial(0, 1.0),
        trial(1, 0.5, **early),
        trial(2, 0.7, **early),
        trial(3, 0.9, status="stopped"),
    )
    keep(spec.config, trial(4, 0.9, status="unfinished"), trial(5, 0.9, status="unfinished"))
    search_folder.keep(
        folder, Progress(9.0, complete=True, note="The search ended early: why.", cut=(2, 4))
    )
    _, found = run.run(spec, SPACE, 0.0, tracker, {})
    assert [(one.status, one.reason) for one in found.trials] == [
        ("finished", ""),
        ("stopped", "asha after 50% of its 8 steps"),
        ("unfinished", "the search ended before the trial did"),
        ("finished", ""),  # all steps were done before the stop reached it
        ("unfinished", "the search ended before the trial did"),
        ("unfinished", ""),  # its process died
    ]
    assert found.notes == ("The search ended early: why.",)
    assert dict(text.facts(found))["best"].startswith(
        "train/loss 0.5 (trial 1, stopped at step 4 of 8): "
    )


def test_a_search_whose_trials_all_failed_tells_the_most_frequent_reasons(
    ended: tuple[Any, Any],
) -> None:
    spec, tracker = ended
    reasons = (
        ["out of memory"] * 5 + ["loss is not finite"] * 3 + [f"reason {i}" for i in range(40)]
    )
    keep(
        spec.config,
        *(trial(i, None, status="failed", reason=reason) for i, reason in enumerate(reasons)),
    )
    with refused("out of memory (5 trials); loss is not finite (3 trials); reason 0 (1 trial); 39"):
        run.run(spec, SPACE, 0.0, tracker, {})


@pytest.mark.parametrize(
    ("field", "other"),
    [("data.train", [{"path": "other.jsonl"}]), ("adapter", {"rank": 2}), ("train.lr", 1e-5)],
)
def test_a_default_that_is_a_list_or_a_section_can_win(
    tmp_path: Path, field: str, other: Any
) -> None:
    """Regression: the value was null in the record, and best.yaml could not be written after all trials."""
    space = Space.model_validate({"search": {field: {"choice": [other]}}, "metric": "train/loss"})
    config = tiny.config(run__storage=str(tmp_path))
    store: Any = tiny.store()
    train_spec = TrainSpec(
        config, BaseModel("tiny", str(tmp_path), "digest"), "digest", (0,), store, None
    )
    spec = SweepSpec("search", str(tmp_path / "search"), train_spec, space, "", 0.0)
    best = trial(0, 0.5, params=json.loads(json.dumps(spec.shown(0, {}))))
    found = outcome.best_config(config, spec, best)
    assert override(found, {"run.name": config.run.name}) == config


CURVE = ((0, 2.0), (4, 1.5), (8, 0.9))


def with_checkpoint(folder: Path, state: TrainState) -> SweepSpec:
    """Return a search whose trial 0 ended early, with this state in its last checkpoint."""
    store: Any = tiny.store()
    config = tiny.decided(run__storage=str(folder))
    train_spec = TrainSpec(
        config, BaseModel("tiny", str(folder), "digest"), "digest", (0,), store, None
    )
    spec = SweepSpec("search", str(folder / "search"), train_spec, SPACE, "", 0.0)
    weights = {
        "q": AdapterWeights(Factors(torch.ones(2, 2), None), torch.ones(2, 2), torch.ones(2, 2))
    }
    place = (
        folder / "search" / "trials" / "trial-000" / "checkpoints" / checkpoints.name_of(state.step)
    )
    checkpoint.save(place, weights, None, {}, state, train_spec.identity(), "")
    return spec


def registered(spec: SweepSpec, metric: str = "eval/loss", **changes: Any) -> None:
    """Register the best trial of a search of one trial that ended early."""
    one = trial(
        0,
        0.9,
        params={"adapter.rank": 4},
        curve=CURVE,
        folder=str(Path(spec.folder, "trials", "trial-000")),
        **changes,
    )
    record = replace(realistic(1), metric=metric, trials=(one,))
    outcome.register(spec, record)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of the exported adapters; nothing is really exported."""
    steps: list[int] = []
    monkeypatch.setattr(
        outcome.run, "register", lambda _, folder, result, *__: steps.append(result.state.step) or 1
    )
    return steps


@pytest.mark.parametrize("status", ["failed", "unfinished", "stopped"])
def test_no_other_adapter_is_registered_than_that_of_the_value(
    tmp_path: Path, exported: list[int], status: str
) -> None:
    """Regression: a trial failed after its best evaluation, and the checkpoint before that was registered."""
    spec = with_checkpoint(tmp_path, TrainState(4, best_loss=1.5, best_step=4))
    for metric in ("eval/loss", "train/loss"):
        with refused("trial 0 has its best value 0.9000 at step 8"):
            registered(spec, metric, status=status)
    assert exported == []


def test_a_stopped_trial_is_registered_whose_checkpoint_has_its_best(
    tmp_path: Path, exported: list[int]
) -> None:
    """Also if other workers have measured the adapter again."""
    spec = with_checkpoint(tmp_path, TrainState(9, best_loss=0.90001, best_step=8))
    registered(spec, status="stopped")
    registered(spec, "train/loss", status="stopped")
    assert exported == [9, 9]


def test_of_a_trial_with_pairs_the_value_is_that_of_the_exported_step(
    tmp_path: Path, exported: list[int]
) -> None:
    """The checkpoint's best loss is the objective, and the search's metric may be another one."""
    row = {"step": 8.0, "eval/objective": 0.4, "eval/loss": 1.7, "eval/pairs/preferred": 0.9}
    spec = with_checkpoint(tmp_path, TrainState(9, best_loss=0.4, best_step=8, history=[row]))
    registered(spec, "eval/pairs/preferred", status="stopped")
    for metric in ("eval/loss", "eval/objective"):
        with refused("of step 9 with the adapter of step 8"):
            registered(spec, metric, status="stopped")
    assert exported == [9]
