"""A phase is a search with fixed trials for Tune, for the trials and for a resumed driver."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from comparison import row_losses
from comparison.folder import FINAL
from comparison.phase import FixedTrials, PhaseSpec, loss_of
from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.source import BaseModel
from olora_ray.sweep import tuner
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.tuner import SweepCallback
from tests import tiny
from tests.comparison import made

ROOT = Path(__file__).parents[2]
TRIALS: list[dict[str, Any]] = [
    {"adapter.method": "lora", "adapter.alpha": 16.0, "train.lr": 3.2e-3, "run.seed": 4},
    {"adapter.method": "olora", "adapter.alpha": 16.0, "train.lr": 2e-4, "run.seed": 4},
    {"adapter.method": "lora", "adapter.alpha": 16.0, "train.lr": 3.2e-3, "run.seed": 5},
    {"adapter.method": "olora", "adapter.alpha": 16.0, "train.lr": 2e-4, "run.seed": 5},
]


def spec(folder: Path, name: str) -> PhaseSpec:
    def tokens(seed: int) -> TrainSpec:
        store: Any = SimpleNamespace(digest=f"order {seed}", total=8)
        return TrainSpec(tiny.config(run__seed=seed), BaseModel("m", "/m", "base"), "t", (1,), store, None)

    specs = {seed: tokens(seed) for seed in (4, 5)}
    return PhaseSpec(
        "x", str(folder / name), specs[4], FixedTrials.of(TRIALS), "parent", 0.0, root=str(folder), specs=specs
    )


def test_tune_gets_each_fixed_trial_once() -> None:
    space = FixedTrials.of(TRIALS)
    assert space.count() == 4
    assert not space.has_default()
    params = tuner._params(space)
    assert params is not None
    numbers = params["number"]["grid_search"]
    assert [space.values({"place": params["place"].sample({"number": number})}) for number in numbers] == TRIALS
    assert [space.values(space.drawn(number)) for number in range(4)] == TRIALS
    assert list(space.search) == list(TRIALS[0])


@pytest.mark.lengthy
def test_the_space_survives_what_tune_does_to_it(tmp_path: Path) -> None:
    space = FixedTrials.of(TRIALS)
    callback = SweepCallback(str(tmp_path), space)
    assert pickle.loads(cloudpickle.dumps(space)) == space
    assert pickle.loads(cloudpickle.dumps(callback)) is callback
    assert not callback.complete()


def test_a_trial_has_the_tokens_of_its_seed_and_the_factors_of_its_method(tmp_path: Path) -> None:
    tuning, final = spec(tmp_path, "tuning-1"), spec(tmp_path, FINAL)
    config = tuning.config(3, {"place": 3})
    assert (config.run.seed, config.adapter.method, config.train.lr) == (5, "olora", 2e-4)
    assert config.run.name == "x-trial-003"
    found = tuning.spec_of(config)
    assert (found.train.digest, found.config, found.shared) == ("order 5", config, f"{tmp_path}/shared/olora")
    # Its factors depend on the seed: it makes them itself. The base model is measured once for a seed.
    assert final.spec_of(config).shared == f"{tmp_path}/shared/seed-5"
    assert final.shares_data()
    assert final.trial_folder(3, config).root == f"{tmp_path}/final/trials/trial-003"


LOADS = """
import pickle, sys
spec, measure = pickle.load(open(sys.argv[1], "rb"))
found = spec.spec_of(spec.config(3, {"place": 3}))
print(found.config.adapter.method, found.train.digest, found.shared, measure.__name__, *map(spec.values, (0,), ({},)))
"""


def test_a_node_without_pipelines_runs_trials_and_measures_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.running(monkeypatch, made.comparison(tmp_path), made.Cluster())
    (tmp_path / "work.pkl").write_bytes(cloudpickle.dumps((spec(tmp_path, "tuning-1"), row_losses.measure)))
    words = [sys.executable, "-c", LOADS, str(tmp_path / "work.pkl")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"olora order 5 {tmp_path}/shared/olora measure {{}}\n", done.stderr


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({}, 0.9),  # not 0.8, the best of its curve
        ({"status": "failed"}, float("inf")),
        ({"total": 30}, float("inf")),
        ({"curve": ((0, 2.0), (20, float("nan")))}, float("inf")),
        ({"curve": ()}, float("inf")),
    ],
)
def test_the_loss_is_that_after_the_last_step(changes: dict[str, Any], loss: float) -> None:
    values: dict[str, Any] = {
        "number": 0, "params": {}, "status": "finished", "value": 0.8, "step": 20, "total": 20,
        "curve": ((0, 2.0), (10, 0.8), (20, 0.9)),
    }  # fmt: skip
    assert loss_of(TrialRecord(**{**values, **changes})) == loss
