"""Comparisons with invented trainings, which leave the same files as real ones."""

import json
import math
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comparison.arguments import Compare, Comparison
from comparison.folder import shared_place
from comparison.phase import PhaseSpec
from comparison.row_losses import FILE, RowLosses
from comparison.rows import RowSets
from comparison.run import Run
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.sweep import run, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.spec import trial_path
from olora_ray.train.checkpoint import TrainState
from tests import tiny

STEPS, EVERY, BASE, ROWS = 40, 5, 1.637, 60
Loss = Callable[[Config], float]
"""The last loss of a training with this config; infinite: it breaks off."""
BEST = {"lora": (1.6e-3 * 2, 0.92), "olora": (2e-4, 0.93)}
"""Method -> the best learning rate, and the loss there."""


def loss(config: Config) -> float:
    """Return a loss as measured: each method has its best rate elsewhere, and breaks off above a rate."""
    best, floor = BEST[config.adapter.method]
    if config.train.lr > 16 * best:
        return math.inf
    luck = 0.003 * np.random.default_rng(config.run.seed).standard_normal()
    return float(floor + 0.04 * math.log2(config.train.lr / best) ** 2 + 0.01 * (config.adapter.alpha < 16) + luck)


def comparison(
    folder: Path,
    methods: tuple[str, ...] = ("lora", "olora"),
    seeds: int = 4,
    compare: Compare = Compare(),  # noqa: B008 - it is frozen
    **changes: Any,
) -> Comparison:
    config = tiny.config(adapter__rank=16, adapter__alpha=16, train__lr=1e-3, train__steps=STEPS)
    named = {"run.name": "task-compare", "run.storage": str(folder), "data.train.0.path": "data/gsm.jsonl"}
    config = override(config, {**named, **changes})
    return Comparison(config, compare, methods, tuple(range(4, 4 + seeds)), None)


def row_sets(rows: int = ROWS) -> RowSets:
    counts = {"train": 1000, "tuning": rows, "test": rows}
    return AllRows({}, counts, {}, {"test-0.jsonl": tuple(range(rows))})


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
    own = 0.05 * np.random.default_rng([config.run.seed, len(config.adapter.method)]).standard_normal(rows)
    losses = (hard + own - np.average(hard + own, weights=tokens) + mean) * tokens
    places = tuple(f"test-0.jsonl:{line + 1}" for line in range(rows))
    return RowLosses("test", places, tuple(map(int, tokens)), tuple(map(float, losses)))


@dataclass
class Cluster:
    """A stand-in for Ray that writes the files of a phase's trainings."""

    last: Loss = loss
    trained: list[dict[str, Any]] = field(default_factory=list)
    """The values of every training that was run."""
    eval_every: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Name of a phase's folder -> train.eval_every of its trainings."""
    left: int = ROWS
    """Test and tuning rows that are not too long."""
    stop_after: int | None = None
    """Trainings after which the driver stops."""
    stop: Callable[[], None] = lambda: signal.raise_signal(signal.SIGINT)
    """The way it stops."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Number of a trial of a phase -> why it fails, once."""

    def search(self, spec: PhaseSpec) -> None:
        if search_folder.progress(spec.folder).complete:
            return
        for number in range(spec.space.count()):
            values = spec.space.values(spec.space.drawn(number))
            folder = Path(trial_path(spec.folder, number))
            if (folder / "training.json").exists():
                self._record(folder, number, values, "finished", json.loads((folder / "training.json").read_text()))
                continue
            if self.stop_after is not None and len(self.trained) >= self.stop_after:
                self.stop()
            self.trained.append(values)
            self._train(spec, folder, number, values)
        search_folder.keep(spec.folder, search_folder.Progress(60.0, complete=True))

    def _train(self, spec: PhaseSpec, folder: Path, number: int, values: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = spec.config(number, spec.space.drawn(number))
        self.eval_every[Path(spec.folder).name].add(config.train.eval_every)
        reason = self.reasons.pop(number, "")
        last = self.last(config)
        if reason or not math.isfinite(last):
            self._record(
                folder, number, values, "failed", None, reason or "step 9: the loss is not finite; it comes from"
            )
            return
        result = TrainResult(state=TrainState(step=STEPS, history=course(last)))
        (folder / "training.json").write_text(result.to_json())
        self._record(folder, number, values, "finished", json.loads(result.to_json()))

    def _record(
        self, folder: Path, number: int, values: dict[str, Any], status: Any, result: Any, reason: str = ""
    ) -> None:
        history = result["state"]["history"] if result else [{"step": 0, "eval/loss": BASE}]
        curve = tuple((int(row["step"]), row["eval/loss"]) for row in history if "eval/loss" in row)
        record = TrialRecord(
            number, values, status, curve[-1][1], curve[-1][0], STEPS, curve, 30.0, folder=str(folder), reason=reason
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

    def _tokens(self, config: Config) -> Any:
        store: Any = Tokens(rows=self.cluster.left)
        return TrainSpec(config, SimpleNamespace(digest="b"), "t", (0,), store, store)  # type: ignore[arg-type]

    def _share(self, spec: Any) -> None:
        for place in (Path(shared_place(self.folder, method)) for method in self.comparison.methods):
            place.mkdir(parents=True, exist_ok=True)
            (place / "init.json").write_text('{"seconds": 0.8, "bytes": 2000000}')

    def _estimate(self, spec: Any) -> None:
        pass

    def _measure(self, trained: Any) -> None:
        for each in trained:
            rows = rows_of(each.spec.config, each.ended.loss, self.cluster.left)
            (Path(each.ended.record.folder) / FILE).write_text(json.dumps(asdict(rows)))


def running(monkeypatch: pytest.MonkeyPatch, found: Comparison, cluster: Cluster) -> Run:
    monkeypatch.setattr(run, "search", cluster.search)
    base: Any = SimpleNamespace(model=SimpleNamespace(name="SmolLM2-135M"), tokenizer=None)
    sizes: Any = {method: SimpleNamespace(trainable=4_884_480) for method in found.methods}
    work = MadeRun(found, base, row_sets(), sizes, "parent")
    work.cluster = cluster
    return work
