"""A phase is a search with fixed trials for Tune, for the trials and for a resumed driver."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from comparison.arguments import Trial
from comparison.folder import FINAL, TUNING, shared_by_adapter
from comparison.phase import FixedTrials, PhaseSpec
from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.source import BaseModel
from tests import tiny
from tests.contrib.comparison import made

ROOT = Path(__file__).parents[3]
ARMS = (made.LORA, made.OLORA)


def trials(folder: Path) -> list[Trial]:
    asked = made.comparison(folder)
    return [asked.trial(arm, 0.5, seed) for seed in (4, 5) for arm in ARMS]


def spec(folder: Path, name: str) -> PhaseSpec:
    def tokens(seed: int) -> TrainSpec:
        store: Any = SimpleNamespace(digest=f"order {seed}", total=8)
        return TrainSpec(
            tiny.config(run__seed=seed, train__steps=10),
            BaseModel("m", "/m", "base"),
            "t",
            (1,),
            store,
            None,
        )

    specs = {seed: tokens(seed) for seed in (4, 5)}
    return PhaseSpec(
        *("x", str(folder / name), specs[4], FixedTrials.of(trials(folder)), "parent", 0.0),
        root=str(folder),
        specs=specs,
        evaluations=4 if name == FINAL else 1,
    )


def test_a_trial_has_the_tokens_of_its_seed_and_the_factors_of_its_adapter(tmp_path: Path) -> None:
    tuning, final = spec(tmp_path, TUNING), spec(tmp_path, FINAL)
    config = tuning.config(3, {"place": 3})
    assert (config.run.seed, config.adapter.method, config.train.lr) == (5, "olora", "auto")
    assert (config.train.lr_factor, config.train.eval_every) == (0.5, 10)
    assert config.run.name == "x-olora-x0.5-seed5"
    found = tuning.spec_of(config)
    assert (found.train.digest, found.config) == ("order 5", config)
    assert found.shared == shared_by_adapter(str(tmp_path), config)
    assert tuning.spec_of(tuning.config(2, {"place": 2})).shared != found.shared
    # Its factors depend on the seed: it makes them itself. The base model is measured once for a seed.
    assert final.spec_of(config).shared == f"{tmp_path}/shared/seed-5"
    assert final.config(3, {"place": 3}).train.eval_every == 2  # after 20%, 40%, ...
    assert final.shares_data()
    assert final.trial_folder(3).root == f"{tmp_path}/final/trials/olora-x0.5-seed5"


LOADS = """
import pickle, sys
spec = pickle.load(open(sys.argv[1], "rb"))
found = spec.spec_of(spec.config(3, {"place": 3}))
print(found.config.adapter.method, found.train.digest, found.shared, spec.space.trial_values(0, {}))
"""


def test_a_node_without_pipelines_runs_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.running(monkeypatch, made.comparison(tmp_path), made.Cluster())
    (tmp_path / "work.pkl").write_bytes(cloudpickle.dumps(spec(tmp_path, FINAL)))
    words = [sys.executable, "-c", LOADS, str(tmp_path / "work.pkl")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"olora order 5 {tmp_path}/shared/seed-5 {{}}\n", done.stderr
