"""Comparisons with invented trainings, which leave the same files as real ones."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comparison.arguments import Arm, Compare, Comparison
from comparison.folder import shared_by_adapter
from comparison.phase import PhaseSpec
from comparison.row_losses import RowLosses
from comparison.rows import RowSets
from comparison.run import INIT, Final, Run
from olora_ray.cluster.decide import Decided
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import run, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.train.checkpoint import TrainState
from tests import tiny

STEPS, EVERY, BASE, ROWS = 40, 5, 1.637, 60
Loss = Callable[[Config], float]
"""The last loss of a training with this config; infinite: it breaks off."""
BEST = {"lora": (2e-3, 0.92), "olora": (2e-4, 0.93)}
"""Method -> the best learning rate, and the loss there."""
AUTO = {"lora": 1.6e-3, "olora": 2e-4}
"""Method -> the automatic rate."""


def rate(config: Config) -> float:
    auto = AUTO.get(config.adapter.method, 1e-3)
    return (auto if config.train.lr == "auto" else config.train.lr) * config.train.lr_factor


def loss(config: Config) -> float:
    """Return a loss as measured: each method has its best rate elsewhere, and breaks off above a rate."""
    best, floor = BEST[config.adapter.method]
    if rate(config) > 16 * best:
        return math.inf
    luck = 0.003 * np.random.default_rng(config.run.seed).standard_normal()
    return float(floor + 0.04 * math.log2(rate(config) / best) ** 2 + luck)


def arm(name: str, **values: Any) -> Arm:
    return Arm(name, {field.replace("__", "."): value for field, value in values.items()})


LORA, OLORA = arm("lora", adapter__method="lora"), arm("olora", adapter__method="olora")


def comparison(
    folder: Path,
    arms: tuple[Arm, ...] = (LORA, OLORA),
    seeds: int = 4,
    compare: Compare = Compare(),  # noqa: B008 - it is frozen
    **changes: Any,
) -> Comparison:
    config = tiny.config(adapter__rank=16, adapter__alpha=16, train__lr="auto", train__steps=STEPS)
    named = {
        "run.name": "task-compare",
        "run.storage": str(folder),
        "data.train.0.path": "data/gsm.jsonl",
    }
    config = override(config, {**named, **changes})
    return Comparison(config, config, compare, arms, tuple(range(4, 4 + seeds)))


def row_sets(rows: int = ROWS) -> RowSets:
    counts = {"train": 1000, "tuning": rows, "test": rows}
    return AllRows({}, counts, {}, {"test-0.jsonl": tuple(range(rows))}, {})


def course(last: float, total: int = STEPS) -> list[dict[str, float]]:
    """Return the history of a training that reaches a loss."""
    history = [{"step": 0.0, "eval/loss": BASE}]
    for step in range(1, total + 1):
        row = {"step": float(step), "train/step_seconds": 0.5, "train/tokens_per_second": 200.0}
        if step % EVERY == 0:
            row["eval/loss"] = last + (BASE - last) * math.exp(-6 * step / total) * (step < total)
        history.append(row)
    return history


def rows_of(config: Config, mean: float, rows: int = ROWS) -> RowLosses:
    """Return losses of each row around a mean; a row is about as hard for each method."""
    tokens = np.random.default_rng(1).integers(5, 40, rows)
    hard = 0.3 * np.random.default_rng(2).standard_normal(rows)
    own = 0.05 * np.random.default_rng(
        [config.run.seed, len(config.adapter.method)]
    ).standard_normal(rows)
    losses = (hard + own - np.average(hard + own, weights=tokens) + mean) * tokens
    places = tuple(f"test-0.jsonl:{line + 1}" for line in range(rows))
    return RowLosses(places, tuple(map(int, tokens)), tuple(map(float, losses)), 4_884_480)


def interrupt() -> None:
    # Not by a signal: a shell lets jobs in its background ignore Ctrl+C.
    raise KeyboardInterrupt


@dataclass
class Cluster:
    """A stand-in for Ray that writes the files of a phase's trainings."""

    last: Loss = loss
    trained: list[dict[str, Any]] = field(default_factory=list)
    """The values of every training that was run."""
    names: list[str] = field(default_factory=list)
    """Their names."""
    eval_every: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Name of a phase's folder -> train.eval_every of its trainings."""
    left: int = ROWS
    """Test and tuning rows that are not too long."""
    stop_after: int | None = None
    """Trainings after which the driver stops."""
    stop: Callable[[], None] = interrupt
    """The way it stops."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name of a trial -> why it fails, once."""

    def search(self, spec: PhaseSpec) -> None:
        if search_folder.progress(spec.folder).complete:
            return
        for number in range(spec.space.count()):
            values = spec.space.values(spec.space.drawn(number))
            if self.stop_after is not None and len(self.trained) >= self.stop_after:
                self.stop()
            self.trained.append(values)
            self.names.append(str(spec.space.own_name(number)))
            self._train(
                spec, Path(spec.folder, "trials", str(spec.space.own_name(number))), number, values
            )
        search_folder.keep(spec.folder, search_folder.Progress(60.0, complete=True))

    def _train(self, spec: PhaseSpec, folder: Path, number: int, values: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = spec.config(number, spec.space.drawn(number))
        self.eval_every[Path(spec.folder).name].add(config.train.eval_every)
        reason = self.reasons.pop(folder.name, "")
        last = self.last(config)
        if reason or not math.isfinite(last):
            self._record(
                folder,
                number,
                values,
                "failed",
                None,
                reason or "step 9: the loss is not finite; it comes from",
            )
            return
        result = TrainResult(
            state=TrainState(
                step=STEPS, history=course(last), lr=AUTO.get(config.adapter.method, 1e-3)
            )
        )
        RunFolder(str(folder)).write_training(result)
        self._record(folder, number, values, "finished", asdict(result))

    def _record(
        self,
        folder: Path,
        number: int,
        values: dict[str, Any],
        status: Any,
        result: Any,
        reason: str = "",
    ) -> None:
        history = result["state"]["history"] if result else [{"step": 0, "eval/loss": BASE}]
        curve = tuple((int(row["step"]), row["eval/loss"]) for row in history if "eval/loss" in row)
        record = TrialRecord(
            number,
            values,
            status,
            curve[-1][1],
            curve[-1][0],
            STEPS,
            curve,
            30.0,
            folder=str(folder),
            reason=reason,
        )
        (folder / "trial.json").write_text(json.dumps(asdict(record)))


@dataclass
class Tokens:
    """A stand-in for a token store, which only has a size."""

    digest: str = "test"
    total: int = 400
    rows: int = ROWS

    def __len__(self) -> int:
        return self.total

    def origins(self, index: int) -> list[str]:
        """Return rows of two examples for the first sequences."""
        return [f"rows/test-0.jsonl:{index + 1}"] * 2 if index < self.rows else []


class AllRows(RowSets):
    def config(self, config: Config, held_out: str) -> Config:
        return config


class MadeRun(Run):
    """A comparison without tokens and models: the tests look at its requests and conclusions."""

    cluster: Cluster

    def _tokens(self, held_out: Any, changes: Any) -> Any:
        store: Any = Tokens(rows=self.cluster.left)
        config = override(self.config, changes)
        return TrainSpec(config, SimpleNamespace(digest="b"), "t", (0,), store, store)  # type: ignore[arg-type]

    def _share(self, spec: Any) -> None:
        for each in self.comparison.arms:
            place = Path(shared_by_adapter(self.folder, override(self.config, each.values)))
            place.mkdir(parents=True, exist_ok=True)
            (place / INIT).write_text("0.8\n")

    def _estimate(self, spec: Any, trials: Any) -> None:
        pass

    def _measured(self, ended: Any, tested: Any) -> list[Final]:
        return [
            Final(
                each,
                rows_of(each.spec.config, each.loss, self.cluster.left)
                if math.isfinite(each.loss)
                else None,
            )
            for each in ended
        ]


def running(monkeypatch: pytest.MonkeyPatch, found: Comparison, cluster: Cluster) -> Run:
    monkeypatch.setattr(run, "search", cluster.search)
    base: Any = SimpleNamespace(model=SimpleNamespace(name="SmolLM2-135M"), tokenizer=None)
    size: Any = SimpleNamespace(total_bytes=lambda: 0)
    decided = Decided(tiny.decided(found.config), {}, tiny.ON_CPU, size)
    work = MadeRun(found, decided, base, row_sets(), {}, "parent")
    work.cluster = cluster
    return work
