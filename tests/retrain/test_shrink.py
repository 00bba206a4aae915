"""A challenger that is better on its task but forgets: the largest part of its change that passes becomes the version.

MLflow, checkpoints and adapters are real. Training and measurement are replaced: whatever part of a change a version
has, it gains and loses that part.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.config.load import dump, load_config, override
from olora_ray.config.schema import Config
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.retrain import shrink
from olora_ray.retrain.compare import Candidate
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking.checksums import GATE, Version
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import TrainState
from tests import mlflow_database, tiny
from tests.retrain.nightly import Nightly
from tests.retrain.test_gate import results
from tests.retrain.test_missing_champion import NAME, Nights, replaced

PART = "test.part"
LAYER = "model.layers.0.self_attn.q_proj"


def weights(da: float, db: float) -> AdapterWeights:
    factors = Factors(torch.full((2, 64), 0.5), torch.full((64, 2), 0.25))
    return AdapterWeights(factors, torch.full((2, 64), da), torch.full((64, 2), db))


def saved(config: Config, adapter: AdapterWeights, best: AdapterWeights | None = None) -> str:
    """Write the last checkpoint of a run, unless it exists; return its folder."""
    folder = Path(config.folder(), "checkpoints", checkpoints.name_of(12))
    if folder.exists():
        return str(folder)
    state = TrainState(step=12, best_loss=0.8, best_step=12)
    for step, loss in ((0, 1.0), (12, 0.8)):
        state.record(step, {"eval/loss": loss, "train/loss": loss})
    earlier = best and {f"{LAYER}.da": best.da, f"{LAYER}.db": best.db}
    checkpoint.save(folder, {LAYER: adapter}, earlier, {}, state, {}, dump(config))
    return str(folder)


class Forgetful(Nights):
    """Nights that gain 0.2 on the held-out rows, and lose `harm` on the guard's."""

    harm = 0.05
    shrinks: Callable[[], object] = staticmethod(lambda: None)
    """Happens when a part of a change is to be registered."""

    def train(self, config: Config, tags: dict[str, str], _base: Any = None) -> dict[str, Any]:
        _, _, part = config.run.name.partition("-shrunk-")
        if part:
            self.shrinks()
        elif self.made():
            saved(config, weights(0.1, 0.2))
        whole = "1" if self.made() else "0"
        return super().train(config, {**tags, PART: part or whole})

    def measured(self, _: object, wanted: list[tuple[Version, Any]]) -> list[RowResults]:
        found = []
        for version, rows in wanted:
            part = float(version.tags[PART])
            if isinstance(version, Candidate):
                adapter = Path(version.adapter, "adapter_model.safetensors")
                assert adapter.is_file()
                part *= version.factor
            loss = 2.0 + self.harm * part
            if rows.name == "the held-out rows":
                loss = 1.0 - 0.2 * part
            found.append(results([loss] * 24, data=rows.name))
        return found

    def told(self) -> list[tuple[str, str]]:
        """Return the events that were sent, each with its version."""
        lines = (self.folder / "told.json").read_text().splitlines()
        return [(each["event"], each["version"]) for each in map(json.loads, lines)]


@pytest.fixture
def nights(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Forgetful:
    """After the first night, whose version is champion."""
    nightly = Nightly(tmp_path, model, gate={"guard": "text"})
    told = {"notify.command": f"cat >>{tmp_path}/told.json; echo >>{tmp_path}/told.json"}
    found = Forgetful(tmp_path, override(load_config(nightly.config), told))
    mlflow_database.place(tmp_path / "runs")
    found.client.create_registered_model(NAME)
    replaced(monkeypatch, found, found.measured)
    found.call(1.0)
    return found


def verdicts(nights: Nights) -> list[str]:
    return [version.verdict for version in nights.aliases.versions()]


def test_the_largest_part_that_passes_is_promoted_and_told_once(nights: Forgetful) -> None:
    log = nights.call(0.8)
    assert nights.aliases.current()["champion"] == "3", log
    _, whole, part = verdicts(nights)
    assert whole.startswith("refused: guard: eval/loss 2.0500")
    assert whole.endswith("; 0.5 of its change passes")
    assert part.startswith("passed: shrunk to 0.5: eval/loss 0.9000")
    assert nights.told() == [("promoted", "1"), ("promoted", "3")]
    assert "nothing changed since version 3" in nights.call()
    assert len(nights.made()) == 3


@pytest.mark.parametrize(
    ("harm", "shrinks", "end"),
    [(0.5, True, "allows less"), (0.05, False, "allows less"), (-0.1, True, "")],
    ids=["no part passes", "switched off", "no harm"],
)
def test_nothing_else_is_registered_twice(
    nights: Forgetful, harm: float, shrinks: bool, end: str
) -> None:
    nights.harm = harm
    nights.config = override(nights.config, {"gate.shrink": shrinks})
    nights.call(0.8)
    assert len(nights.made()) == 2
    verdict = verdicts(nights)[-1]
    event = "refused" if end else "promoted"
    assert nights.told()[1:] == [(event, "2")]
    assert verdict.endswith(end)
    assert ("0.25 of its change does not pass either: guard" in verdict) == (shrinks and harm > 0)
    assert "nothing changed since version 2" in nights.call()


def test_a_night_that_was_killed_after_the_refusal_ends_with_the_part(nights: Forgetful) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    nights.shrinks = killed
    with pytest.raises(KeyboardInterrupt):
        nights.call(0.8)
    assert nights.aliases.version("2").tags[GATE].startswith("refused: guard")
    assert nights.told() == [("promoted", "1")]
    del nights.shrinks
    log = nights.call()
    assert nights.aliases.current()["champion"] == "3", log
    assert nights.aliases.version("3").tags[AGAINST] == "1"
    assert nights.told() == [("promoted", "1"), ("promoted", "3")]


def test_a_person_decides_about_the_whole_change_and_about_its_part(nights: Forgetful) -> None:
    nights.call(0.8)
    nights.aliases.rollback("by hand")
    assert "nothing changed since version 3" in nights.call()
    nights.aliases.promote("2", "promoted by hand")
    assert "nothing changed since version 2" in nights.call()
    assert nights.aliases.current()["champion"] == "2"


@pytest.mark.parametrize("origin", ["base", "champion"])
def test_a_part_of_a_change_is_on_the_way_from_the_start_to_the_best_step(
    tmp_path: Path, origin: str
) -> None:
    """The run folder has no steps left, and none of the held-out numbers of the whole change."""
    trained = tiny.config(run__name="nightly-0123abcd", run__storage=str(tmp_path))
    start = weights(0.0, 0.0)
    if origin == "champion":
        start = weights(0.4, -0.1)
        champion = override(trained, {"run.name": "nightly-champion"})
        from_champion = {"train.start": saved(champion, weights(9.0, 9.0), start)}
        trained = override(trained, from_champion)
    best = weights(0.8, 0.7)
    saved(trained, weights(9.0, 9.0), best)
    config = shrink.prepare(trained, 0.25)
    assert config.run.name == "nightly-0123abcd-shrunk-0.25"
    folder = RunFolder(config.folder())
    latest = checkpoints.latest_good(folder.checkpoints)
    assert latest is not None
    found = latest[1]
    part = found.best_adapter()[LAYER]
    torch.testing.assert_close(part.da, start.da + 0.25 * (best.da - start.da))
    torch.testing.assert_close(part.db, start.db + 0.25 * (best.db - start.db))
    assert torch.equal(part.factors.a0, best.factors.a0)
    state = found.state
    assert (state.step, state.best_loss, state.best_step, state.shrunk) == (12, None, None, 0.25)
    assert [row.get("eval/loss") for row in state.history] == [1.0, None]
    assert folder.check(config).step == 12
    assert shrink.prepare(trained, 0.25) == config
