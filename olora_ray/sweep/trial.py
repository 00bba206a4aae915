"""One trial: a training like any other, told to Ray Tune evaluation by evaluation.

A class and not a function, because Tune ends a function trial within moments, and its workers' placement group
then depends on a cleaner that may fail. Here Tune waits in `cleanup` until the workers have written a
checkpoint, ended, and given their resources back.
"""

import logging
import queue
import threading
from dataclasses import dataclass, replace
from typing import Any

import ray

from olora_ray.cluster import shared_base
from olora_ray.cluster.failures import reason
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import logs, storage
from olora_ray.common.errors import Stopped, UserError
from olora_ray.model import load
from olora_ray.pipeline import fit, mlflow_run
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.monitor import OnRow
from olora_ray.pipeline.prepare import prepare_tokens
from olora_ray.pipeline.signals import Stop
from olora_ray.sweep import trial_file
from olora_ray.sweep.record import Status, TrialRecord
from olora_ray.sweep.spec import SweepSpec, trial_place
from olora_ray.tokens.prepare import CompleteStore
from olora_ray.tracking.run import Tracker
from olora_ray.train.checkpoints import copy_from

END_SECONDS = 120.0
"""How long a trial that is stopped may take for its last step and checkpoint."""
FAR = 60.0
"""How long a checkpoint that is to be taken over may still be on its way to the storage."""


@dataclass(frozen=True)
class Measured:
    """An evaluation."""

    step: int
    value: float


@dataclass(frozen=True)
class Ended:
    """There is no more."""

    status: Status
    reason: str = ""


class TrialRun:
    """A trial's training in a thread of this process."""

    def __init__(self, job: SweepSpec, number: int, draws: dict[str, Any]) -> None:
        self.job, self.number, self.draws = job, number, draws
        self.config = job.config(number, draws)
        self.folder = job.trial_folder(number, self.config)
        self.total = job.steps(self.config)
        self._told = 0
        self._items: queue.Queue[Measured | Ended] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._stop = Stop()
        record = TrialRecord(
            number,
            job.shown(number, draws),
            "unfinished",
            spared=job.spared if job.shares_data() else 0.0,
            folder=self.folder.root,
        )
        self._ledger = trial_file.TrialFile(trial_place(job.folder, number), record, job.space.better())

    def next(self) -> Measured | Ended:
        """Wait for the next evaluation or the end; starts the training."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trial", daemon=True)
            self._thread.start()
        return self._items.get()

    def go_on_from(self, checkpoints: str, step: int) -> None:
        """Put a checkpoint where the training will find it; must come before `next`."""
        self._told = step
        self._ledger.go_on_from(step)
        if step:
            copy_from(checkpoints, self.folder.checkpoints, step, FAR)
        storage.remove(self.folder.training)

    def end(self) -> None:
        """Stop after the step that is under way, with a checkpoint; waits for that."""
        if self._thread is not None:
            self._stop.asked = "SIGTERM"
            self._thread.join(END_SECONDS)

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
        self._ledger.ended(ended.status, ended.reason)
        self._items.put(ended)

    def _train(self) -> None:
        spec = self._task()
        with (
            mlflow_run.tracked(spec, self.folder, self.job.parent) as tracker,
            logs.handled_by(_TrialFile(self.folder.root)),
        ):
            self._note_run(tracker)
            self.folder.claim()
            result = fit.finished_training(spec, self.folder)
            if result is None:
                result = self._fitted(spec, tracker)
            assert result.state is not None
            for row in result.state.history:  # those of a training that had ended before
                self._on_row(int(row["step"]), row)
            self._score(spec, result)

    def _fitted(self, spec: TrainSpec, tracker: Tracker) -> TrainResult:
        on_row: OnRow = self._on_row
        fit_on = self._fit_on_shared_base(spec) if self.job.hosts else None
        return fit.train(spec, self.folder, CompleteStore(spec.train), tracker, self._stop, on_row, fit_on)

    def _fit_on_shared_base(self, spec: TrainSpec) -> fit.FitOn:
        def fit_on(channel: Any, workers: int) -> TrainResult:
            return shared_base.train_on(self.job.hosts, spec, self.folder.checkpoints, channel)

        return fit_on

    def _task(self) -> TrainSpec:
        config, job = self.config, self.job
        if job.shares_data():
            return replace(job.train_spec, config=config)
        held = ray.cluster_resources().get("CPU", 0.0)  # by other trials
        spec, _ = prepare_tokens(config, open_base(config), wait=True, cpus_held=held)
        return spec

    def _on_row(self, step: int, row: dict[str, float]) -> None:
        if step and "train/loss" in row:
            self._ledger.started()
        every = self.config.train.eval_every
        due = step == self.total or step % every == 0
        metric = self.job.space.metric
        if metric not in row or (metric == "train/loss" and not due):
            return
        if step == 0 and not self._ledger.record.curve:
            self._ledger.measured(step, row[metric])
        if step > self._told:
            self._told = step
            self._ledger.measured(step, row[metric])
            self._items.put(Measured(step, row[metric]))

    def _score(self, spec: TrainSpec, result: TrainResult) -> None:
        """Report a metric that is measured at the end."""
        from olora_ray.pipeline import answers

        metric = self.job.space.metric
        if not metric.startswith("score/"):
            return
        tokenizer = load.load_tokenizer(spec.base, spec.config.model)
        scores = answers.score(spec.config, answers.answered(result, tokenizer)).get("after", {})
        if (value := scores.get(metric.removeprefix("score/"))) is None:
            raise UserError(f"metric: the scorer gives no {metric}; it gives {', '.join(scores) or 'nothing'}")
        step = result.state.step if result.state else 0
        self._ledger.measured(step, value)
        self._items.put(Measured(step, value))

    def _note_run(self, tracker: Tracker) -> None:
        self._ledger.record = replace(self._ledger.record, mlflow_run=tracker.run_id)


class _TrialFile(logging.Handler):
    """Keeps the trial's log, log.txt in its folder: line by line, or at the end if the storage is elsewhere."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.setFormatter(logs.LineFormatter())
        self.place = storage.join(root, "log.txt")
        self._remote = storage.is_uri(root)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self.format(record)}\n"
        if self._remote:
            self._lines.append(text)
        else:
            with open(self.place, "a", encoding="utf-8") as file:
                file.write(text)

    def close(self) -> None:
        if self._lines:
            storage.write_text(self.place, "".join(self._lines))
            self._lines = []
        super().close()
