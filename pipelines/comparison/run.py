"""A comparison of methods: the learning rate is tuned for each; then all are trained with new seeds and compared.

Every phase is a search with fixed trials, and no finished trial runs again. An interrupted comparison computes the
grids again, gets the same trials, and finds the finished ones in their folders.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from comparison import estimate, phase, row_losses
from comparison.arguments import Comparison
from comparison.estimate import Before, Pace
from comparison.folder import FINAL, has_begun, shared_place, tuning_name
from comparison.grid import BASELINE, Cell, Tuned, following, tuned
from comparison.phase import Ended, FixedTrials, PhaseSpec
from comparison.row_losses import RowLosses
from comparison.rows import RowSets
from olora_ray.adapter import initialise
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.load import flatten, leaves, override
from olora_ray.config.schema import NO_GATE, Config
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.prepare import plan, prepare_tokens
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import run as search
from olora_ray.sweep import shared_work
from olora_ray.tracking import start
from olora_ray.tracking.run import Tracker
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loader import total_steps

logger = logging.getLogger("olora_ray.comparison")

QUIET = {**NO_GATE, "evaluation.scorer": None, "evaluation.samples": 0}
"""Settings of trainings whose answers are not needed."""
INIT = "init.json"
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Tuning:
    losses: Mapping[Cell, float]
    base: float
    """Loss of the base model on the tuning rows."""
    best: Mapping[str, Tuned]
    """Method -> its best point, for methods with a trial that did not break off."""
    rows: int
    """Number of tuning rows that were measured."""


@dataclass(frozen=True)
class Final:
    method: str
    seed: int
    spec: TrainSpec
    ended: Ended
    losses: RowLosses | None
    """Losses on the test rows; None if it broke off."""


@contextlib.contextmanager
def tracked(comparison: Comparison, base: Base) -> Iterator[Tracker]:
    """Yield the comparison's own MLflow run, the parent of all trainings' runs."""
    config = comparison.config
    tags = {"olora.kind": "comparison", "olora.base_digest": base.model.digest}
    asked = {"methods": ",".join(comparison.methods), "seeds": len(comparison.seeds)}
    params = flatten(config) | dict(leaves(comparison.compare.model_dump(mode="json"), "compare")) | asked
    with start.mlflow_run(config, tags, RunFolder(config), params, after_error="KILLED") as tracker:
        yield tracker


def sizes(comparison: Comparison, base: Base) -> dict[str, MemoryEstimate]:
    """Return method -> size of a training; raises UserError if the model or the rank does not allow a method."""
    return {
        method: plan(override(comparison.config, {"adapter.method": method}), base.model)
        for method in comparison.methods
    }


def machine() -> str:
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPUs{gpus}"


class Run:
    def __init__(
        self, comparison: Comparison, base: Base, rows: RowSets, sizes: Mapping[str, MemoryEstimate], parent: str
    ) -> None:
        """`sizes` is by method, `parent` the id of the comparison's MLflow run; needs ray.init."""
        # Workers have olora_ray, but pipelines/ is missing there or in another folder. So tasks carry this code.
        ray.cloudpickle.register_pickle_by_value(sys.modules["comparison"])
        self.comparison, self.base, self.rows, self.sizes, self.parent = comparison, base, rows, sizes, parent
        self.config, self.folder = comparison.config, comparison.config.folder()
        self._pace = Pace(None, 1)
        self._phases: list[str] = []

    def seconds(self) -> float:
        return phase.seconds(self._phases)

    def tune(self) -> Tuning:
        """Run rounds of trials until every grid is complete."""
        spec = self._tokens(self.rows.config(override(self.config, QUIET), "tuning"))
        steps = total_steps(spec.config.train, len(spec.train))
        # Only the loss after the last step counts, so none is measured before: that would take half the time or more.
        spec = replace(spec, config=override(spec.config, {"train.eval_every": steps}))
        self._share(spec)
        self._estimate(spec)
        losses: dict[Cell, float] = {}
        bases: list[float] = []
        extra = self.comparison.untuned()
        while wanted := following(self.comparison.arms(), losses):
            cells = [*wanted, *(each for each in extra if each not in wanted and each not in losses)]
            # Untuned points run with the first round only.
            extra = []
            number = len(self._phases) + 1
            logger.info(f"tuning, round {number}: {plural(len(cells), 'trial')}")
            trials = self._phase(tuning_name(number), [each.changes() for each in cells], {spec.config.run.seed: spec})
            losses |= {cell: each.loss for cell, each in zip(cells, trials, strict=True)}
            bases += [base for each in trials if (base := each.base()) is not None]
            self._again(trials, losses)
        assert spec.eval is not None
        rows = len(set(row_losses.places_of(spec.eval)))
        return self._tuned(losses, bases[0] if bases else math.inf, rows)

    def train(self, tuning: Tuning) -> list[Final]:
        """Train every method at its best point with every seed, and measure it on the test rows."""
        cells = {method: best.cell for method, best in tuning.best.items()}
        # Without the baseline, or with it alone, there is nothing to compare.
        if BASELINE not in cells or len(cells) < 2:
            return []
        pairs = [(seed, method) for seed in self.comparison.seeds for method in cells]
        specs = {seed: self._tokens(self._seeded(seed)) for seed in self.comparison.seeds}
        self._check_groups(next(iter(specs.values())))
        trials = [{**cells[method].changes(), "run.seed": seed} for seed, method in pairs]
        logger.info(f"final trainings: {', '.join(cells)} with {plural(len(specs), 'fresh seed')} each")
        ended = self._phase(FINAL, trials, specs)
        trained = [
            Final(method, seed, replace(specs[seed], config=override(specs[seed].config, trial)), each, None)
            for (seed, method), trial, each in zip(pairs, trials, ended, strict=True)
        ]
        self._measure([each for each in trained if math.isfinite(each.ended.loss)])
        return [replace(each, losses=_read(each)) for each in trained]

    def _check_groups(self, spec: TrainSpec) -> None:
        assert spec.eval is not None
        # Rows that are too long have no tokens. If one group is left, the result would hold for this group alone.
        places = row_losses.places_of(spec.eval)
        if len(set(row_losses.group_numbers(places, self.rows.groups))) < 2:
            raise UserError(
                f"compare.test_rows: only {len(set(places))} of the {self.rows.counts['test']} test rows fit in"
                " data.max_length, and all are of one group; set data.max_length or compare.test_rows higher, and"
                " choose another run.name"
            )

    def initialisation(self, method: str) -> tuple[float, int]:
        """Return (seconds, bytes of the factors) of a method's initialisation."""
        noted = json.loads(storage.read_text(storage.join(shared_place(self.folder, method), INIT)))
        return float(noted["seconds"]), int(noted["bytes"])

    def _seeded(self, seed: int) -> Config:
        return override(self.rows.config(self.config, "test"), {"run.seed": seed})

    def _tokens(self, config: Config) -> TrainSpec:
        return prepare_tokens(config, self.base, wait=True).spec

    def _share(self, spec: TrainSpec) -> None:
        # All rounds of the tuning use the same factors and the same loss of the base model, so they are computed once.
        baseline = ""
        for method in self.comparison.methods:
            folder = shared_place(self.folder, method)
            if not storage.exists(storage.join(folder, INIT)):
                # Factors of an interrupted attempt would be reused, and the noted time would be too short.
                storage.remove(folder)
                if baseline:
                    storage.write_text(storage.join(folder, "baseline.json"), baseline)
                own = replace(spec, config=override(spec.config, {"adapter.method": method}), shared=folder)
                wanted = [(method, self.config.adapter.rank)]
                seconds = shared_work.made(
                    own, folder, wanted, f"{method} factors, shared by the trials of the tuning"
                ).init
                size = storage.size(storage.join(own.factor_place(), initialise.TENSORS)) or 0
                storage.write_text(storage.join(folder, INIT), json.dumps({"seconds": seconds, "bytes": size}) + "\n")
                logger.info(f"{method} factors, shared by the trials of the tuning: {seconds:.2f} s")
            baseline = baseline or _text(storage.join(folder, "baseline.json"))

    def _phase(self, name: str, trials: Sequence[Mapping[str, Any]], specs: Mapping[int, TrainSpec]) -> list[Ended]:
        folder = storage.join(self.folder, name)
        self._phases.append(folder)
        space = FixedTrials.of(trials)
        spec = PhaseSpec(
            name=f"{self.config.run.name}-{name}",
            folder=folder,
            train_spec=next(iter(specs.values())),
            space=space,
            parent=self.parent,
            spared=0.0,
            root=self.folder,
            specs=specs,
        )
        return phase.ended(spec)

    def _estimate(self, spec: TrainSpec) -> None:
        side_by_side = max(1, search.room(worker_resources(self.config)) // self.config.cluster.min_workers())
        curve_every = self.config.train.eval_every
        self._pace = estimate.measured(spec, self.sizes[BASELINE], side_by_side, curve_every)
        logger.info(estimate.line(self.comparison, self._pace, [], self._before()))
        # A comparison that has begun is checked in `_again`, which knows the time it has spent.
        if not has_begun(self.folder):
            estimate.check_budget(self.comparison, self._pace, 0.0, [])

    def _again(self, trials: Sequence[Ended], losses: Mapping[Cell, float]) -> None:
        tried = list(losses)
        self._pace = estimate.of_records([each.record for each in trials], self._pace)
        before = replace(self._before(), tuned=not following(self.comparison.arms(), losses))
        logger.info(estimate.line(self.comparison, self._pace, tried, before))
        if not storage.exists(storage.join(self.folder, FINAL)):
            estimate.check_budget(self.comparison, self._pace, self.seconds(), tried, before, began=True)

    def _before(self) -> Before:
        # An earlier attempt may have finished trials of the phases that come.
        number, tuning = len(self._phases) + 1, 0
        while ended := phase.ended_before(storage.join(self.folder, tuning_name(number))):
            number, tuning = number + 1, tuning + ended
        return Before(tuning, phase.ended_before(storage.join(self.folder, FINAL)))

    def _tuned(self, losses: Mapping[Cell, float], base: float, rows: int) -> Tuning:
        best = {}
        for method in self.comparison.methods:
            point = tuned(method, self.comparison.arms(), losses, base, self.comparison.compare.relevant)
            if point is None:
                logger.warning(f"{method}: every trial broke off, so the method is not compared")
                continue
            best[method] = point
            edge = "" if point.inside else "; it lies at the end of the grid, so a better one may lie beyond"
            logger.info(
                f"{method}: best of {point.points} trials at train.lr={point.cell.lr:g}"
                f" adapter.alpha={point.cell.alpha:g}, loss {point.loss:.4f} on the tuning rows{edge}"
            )
        return Tuning(losses, base, best, rows)

    def _measure(self, trained: Sequence[Final]) -> None:
        # Losses that an earlier attempt has measured are kept in the trials' folders.
        left = [(each.ended.record.folder, each.spec) for each in trained if _read(each) is None]
        if not left:
            return
        logger.info(f"measuring {plural(len(left), 'adapter')} on each of the test rows")
        wanted = worker_resources(self.config)
        number = max(1, min(len(left), search.room(wanted)))
        task = ray.remote(row_losses.measure).options(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0))
        tasks = [task.remote(left[first::number]) for first in range(number)]
        logged = 0
        while tasks:
            ready, tasks = ray.wait(tasks, timeout=SECONDS_BETWEEN_LINES)
            with user_errors():
                ray.get(ready)
            done = sum(storage.exists(storage.join(folder, row_losses.FILE)) for folder, _ in left)
            if tasks and done > logged:
                logged = done
                logger.info(f"measured {done} of {plural(len(left), 'adapter')}")


def _read(trained: Final) -> RowLosses | None:
    assert trained.spec.eval is not None
    return RowLosses.read(trained.ended.record.folder, trained.spec.eval.digest)


def _text(file: str) -> str:
    # The file is missing for a sharded base model, whose loss the trials measure.
    try:
        return storage.read_text(file)
    except OSError:
        return ""
