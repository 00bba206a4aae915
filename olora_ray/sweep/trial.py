"""One trial of a search: an ordinary training, in a thread that hands over its evaluations one by one."""

import contextlib
import io
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from olora_ray.cluster import shared_base
from olora_ray.cluster.connection import Stop
from olora_ray.cluster.failures import reason
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import logs, storage
from olora_ray.common.errors import Stopped, UserError
from olora_ray.config.decided import DecidedConfig, with_values
from olora_ray.model import load
from olora_ray.pipeline import fit, publish
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.prepare import prepare_tokens, read_data
from olora_ray.pipeline.run_folder import by_step
from olora_ray.sweep.record import Status, TrialFile, TrialRecord
from olora_ray.sweep.space import Draws
from olora_ray.sweep.spec import SweepSpec
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)


def trial_spec(sweep_spec: SweepSpec, config: DecidedConfig) -> TrainSpec:
    """Return the specification of a trial; raise UserError as `open_base` and `prepare_tokens` do.

    If the search varies `model.*` or `data.*`, the trial decides for itself what follows from them: formats, chats and
    packing.
    """
    if sweep_spec.shares_data():
        return sweep_spec.spec_of(config)
    base = open_base(config)
    data = read_data(sweep_spec.asked(config), base)
    own = with_values(data.config, DecidedConfig, {})
    planned = sweep_spec.train_spec.planned
    return prepare_tokens(own, base, planned, wait=True).spec


@dataclass(frozen=True)
class TrialLosses:
    step: int
    value: float | None
    """The metric; None if the step was not evaluated."""
    row: Mapping[str, float] = field(default_factory=dict, compare=False)
    """All metrics of the step."""
    paired: float | None = None
    """The mean training loss of the second half of the steps so far, where trials are compared by it."""


@dataclass(frozen=True)
class Ended:
    status: Status
    reason: str = ""


class TrialRun:
    def __init__(self, sweep_spec: SweepSpec, number: int, draws: Draws) -> None:
        self.sweep_spec = sweep_spec
        self.config = sweep_spec.config(number, draws)
        self.folder = sweep_spec.trial_folder(number)
        self.total = sweep_spec.steps(self.config)
        """Steps of this trial; certain once it trains, since it may have tokens of its own."""
        self._reported = 0
        self._losses: dict[int, float] = {}
        """Training loss of each step, as far as a comparison needs them."""
        self._rungs = sweep_spec.rungs()
        self._items: queue.Queue[TrialLosses | Ended] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._stop = Stop()
        begun = TrialRecord(
            number,
            sweep_spec.shown(number, draws),
            "unfinished",
            total=self.total,
            spared=sweep_spec.spared if sweep_spec.shares_data() else 0.0,
        )
        self._file = TrialFile(self.folder.root, begun, sweep_spec.space.better())

    def next(self) -> TrialLosses | Ended:
        """Return the next evaluation or the end. The first call starts the training."""
        if self._thread is None:
            self._file.begin()
            self._thread = threading.Thread(target=self._work, name="trial", daemon=True)
            self._thread.start()
        return self._items.get()

    def end(self) -> None:
        """Stop after the current step, and wait for the checkpoint of that step."""
        if self._thread is not None:
            self._stop.asked = "SIGTERM"
            self._thread.join(120.0)

    def _work(self) -> None:
        try:
            self._train()
            ended = Ended("finished")
        except Stopped:
            ended = Ended("stopped")
        except UserError as error:
            ended = Ended("failed", str(error))
        except Exception as error:
            ended = Ended("failed", f"{type(error).__name__}: {reason(error)}")
        try:
            self._file.ended(ended.status, ended.reason)
        finally:  # otherwise `next` would wait for ever
            self._items.put(ended)

    def _train(self) -> None:
        others = self._drop_other_values()
        search = self.sweep_spec
        spec = trial_spec(search, self.config)
        self.total = search.steps(self.config, spec.train)
        self._file.record = replace(self._file.record, total=self.total)
        with (
            publish.tracked(search.tracked(spec), self.folder, search.parent) as tracker,
            _log_file(self.folder.root),
        ):
            self._file.record = replace(self._file.record, mlflow_run=tracker.run_id)
            if others:
                logger.warning(
                    f"the resumed search gave this trial other values, so the trial restarts: {others}"
                )
            state = self.folder.state()
            self.folder.write_config(spec.config, search.decided(spec.config), state)
            result = fit.finished_training(spec, self.folder, state)
            if result is None:
                self._file.keep_curve(state.step or 0)
                result = self._fitted(spec, tracker)
            assert result.state is not None
            # The rows of a training that had ended before, too, and those that the driver did not get in time.
            rows = by_step(result.state.history)
            tracker.metrics(rows)
            for step, row in rows.items():
                self._on_row(step, row)
            self._score(spec, result)

    def _drop_other_values(self) -> str:
        """Remove the files of a trial that had this number and other values; return which values differ."""
        # A killed Tune forgets the latest draws of Optuna. After the restart Optuna draws again, from the results so
        # far, and the training must not resume from a checkpoint of the old values.
        if self.sweep_spec.space.searcher != "tpe":
            return ""
        others = self.folder.state().other_settings(self.config)
        if not others:
            return ""
        storage.remove(self.folder.root)
        self._file.begin()
        return others

    def _fitted(self, spec: TrainSpec, tracker: Tracker) -> TrainResult:
        search = self.sweep_spec

        def on_shared_base(channel: Any, workers: int) -> TrainResult:
            adapters = search.space.trials_per_worker
            return shared_base.train_on(
                search.shared_bases, adapters, spec, self.folder.checkpoints, channel
            )

        fit_on = on_shared_base if search.shared_bases else None
        return fit.train(spec, self.folder, None, tracker, self._stop, self._on_row, fit_on)

    def _on_row(self, step: int, row: dict[str, float]) -> None:
        if step and "train/loss" in row:
            self._file.started()
            if step <= max(self._rungs, default=0):
                self._losses[step] = row["train/loss"]
        metric = self.sweep_spec.space.metric
        value = row.get(metric)
        due = step == self.total or step % self.config.train.eval_every == 0
        if metric == "train/loss" and not due:
            value = None
        if value is not None:
            self._file.measured(step, value)
        if step <= self._reported or (value is None and step not in self._rungs):
            return
        self._reported = step
        paired = None
        if step in self._rungs:
            latest = [loss for other, loss in self._losses.items() if step / 2 < other <= step]
            paired = sum(latest) / len(latest)
            self._file.compared(step, paired)
        self._items.put(TrialLosses(step, value, row, paired))

    def _score(self, spec: TrainSpec, result: TrainResult) -> None:
        from olora_ray.pipeline import answers

        metric = self.sweep_spec.space.metric
        if not metric.startswith("score/"):
            return
        tokenizer = load.load_tokenizer(spec.base, spec.config.model)
        scores = answers.scores_after(spec.config, result, tokenizer)
        value = scores.get(metric.removeprefix("score/"))
        if value is None:
            raise UserError(
                f"metric: the scorer does not return {metric}, only {', '.join(scores) or 'nothing'}"
            )
        assert result.state is not None
        step = result.state.step
        self._file.measured(step, value)
        self._items.put(TrialLosses(step, value))


@contextlib.contextmanager
def _log_file(root: str) -> Iterator[None]:
    """Write log lines into the trial's log.txt: at once in a local folder, at the end if the storage is a URI."""
    path = storage.join(root, "log.txt")
    lines = io.StringIO()
    handler: logging.Handler = logging.StreamHandler(lines)
    if not storage.is_uri(root):
        handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    try:
        with logs.handled_by(handler):
            yield
    finally:
        text = lines.getvalue()
        if text:
            with contextlib.suppress(OSError):  # losing the lines must not end the trial
                storage.write_text(path, text)
