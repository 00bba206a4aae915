"""One trial: a training like any other, told to Ray Tune evaluation by evaluation.

A class and not a function, because Tune ends a function trial within moments, and its workers' placement group
then depends on a cleaner that may fail. Here Tune waits in `cleanup` until the workers have written a
checkpoint, ended, and given their resources back.
"""

import json
import logging
import queue
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from olora_ray.cluster import shared_base
from olora_ray.cluster.failures import reason
from olora_ray.cluster.spec import Outcome, Task
from olora_ray.common import storage
from olora_ray.common.errors import Stopped, UserError
from olora_ray.common.quiet import quiet_ray
from olora_ray.model import source
from olora_ray.pipeline import fit as launch
from olora_ray.pipeline import publish
from olora_ray.pipeline.monitor import OnRow
from olora_ray.pipeline.signals import Stop
from olora_ray.sweep import trial_file
from olora_ray.sweep.record import Status, TrialRecord
from olora_ray.sweep.spec import ENDED, NUMBER, Job, number_of, trial_place
from olora_ray.tokens.prepare import Made
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoints as keeper

POINTER = "checkpoint.json"
END_SECONDS = 120.0
"""How long a trial that is stopped may take for its last step and checkpoint."""
FAR = 60.0
"""How long a checkpoint that is to be taken over may still be on its way to the storage."""


class TrialFailed(Exception):
    """A trial has ended without a result; the search goes on."""


class SearchTrial(tune.Trainable):
    """Tune's view of a trial."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # see with_parameters
        """`config` has the trial's number, and its draws."""
        quiet_ray()
        for name in ("mlflow", "olora_ray"):
            logging.getLogger(name).setLevel(logging.ERROR)  # a warning for each trial hides the search
        draws = {name: value for name, value in config.items() if name != NUMBER}
        # A member of a population takes over another's config, with its number: the name stays its own.
        self.training = Training(job, number_of(self.trial_name), draws)
        self.last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation; raises TrialFailed if there will be none."""
        item = self.training.next()
        if isinstance(item, Ended):
            if item.status == "failed":
                raise TrialFailed(item.reason)
            return {**self.last, "done": True, ENDED: True}
        self.last = {"step": item.step, self.training.job.space.metric: item.value}
        if item.step >= self.training.total:
            ended = isinstance(self.training.next(), Ended)
            return {**self.last, "done": ended, ENDED: ended}
        return dict(self.last)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the checkpoint of the last evaluation lies; Tune keeps this note, not the tensors."""
        note = {"checkpoints": self.training.folder.checkpoints, "step": self.last.get("step", 0)}
        Path(checkpoint_dir, POINTER).write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]  # Tune gives the folder
        """Go on from a checkpoint of this trial, or take over that of a better one."""
        note = json.loads(Path(checkpoint, POINTER).read_text(encoding="utf-8"))
        self.training.go_on_from(note["checkpoints"], int(note["step"]))

    def cleanup(self) -> None:
        """End the workers and wait for them."""
        self.training.end()


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


class Training:
    """A trial's training in a thread of this process."""

    def __init__(self, job: Job, number: int, draws: dict[str, Any]) -> None:
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
        self._ledger = trial_file.Ledger(trial_place(job.folder, number), record, job.space.better())

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
            keeper.adopt(checkpoints, self.folder.checkpoints, step, FAR)
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
        task = replace(self._task(), board=launch.make_board())
        with publish.tracked(task, self.folder, self.job.parent) as tracker, Log(self.folder.root) as say:
            self._note_run(tracker)
            self.folder.claim()
            outcome = publish.trained(task, self.folder, say)
            if outcome is None:
                outcome = self._fitted(task, tracker, say)
            assert outcome.state is not None
            for row in outcome.state.history:  # those of a training that had ended before
                self._on_row(int(row["step"]), row)
            self._score(task, outcome)

    def _fitted(self, task: Task, tracker: Tracker, say: launch.Say) -> Outcome:
        on_row: OnRow = self._on_row
        fit = self._fit_on_host(task) if self.job.hosts else None
        return launch.train(task, self.folder, Made(task.train), tracker, self._stop, say, on_row, fit)

    def _fit_on_host(self, task: Task) -> launch.Fit:
        def fit(workers: int) -> Outcome:
            return shared_base.train(self.job.hosts, task, self.folder.checkpoints)

        return fit

    def _task(self) -> Task:
        config, job = self.config, self.job
        if job.shares_data():
            return replace(job.task, config=config)
        base = source.obtain(config, _silent, publish.registered(config))
        tokenizer = source.load_tokenizer(base, config.model)
        held = ray.cluster_resources().get("CPU", 0.0)  # by other trials
        return launch.made_task(config, base, tokenizer, _silent, cpus_held=held)

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

    def _score(self, task: Task, outcome: Outcome) -> None:
        """Report a metric that is measured at the end."""
        from olora_ray.pipeline import report

        metric = self.job.space.metric
        if not metric.startswith("score/"):
            return
        tokenizer = source.load_tokenizer(task.base, task.config.model)
        scores = report.score(task.config, report.texts(outcome, tokenizer)).get("after", {})
        if (value := scores.get(metric.removeprefix("score/"))) is None:
            raise UserError(f"metric: the scorer gives no {metric}; it gives {', '.join(scores) or 'nothing'}")
        step = outcome.state.step if outcome.state else 0
        self._ledger.measured(step, value)
        self._items.put(Measured(step, value))

    def _note_run(self, tracker: Tracker) -> None:
        self._ledger.record = replace(self._ledger.record, mlflow_run=tracker.run_id)


def _silent(line: str) -> None:
    """The search says what is the same for all trials."""


class Log:
    """The trial's own log: log.txt in its folder, line by line; written at the end if the storage is elsewhere."""

    def __init__(self, root: str) -> None:
        self.place = storage.join(root, "log.txt")
        self._remote = storage.is_uri(root)
        self._lines: list[str] = []

    def __enter__(self) -> launch.Say:
        return self._say

    def __exit__(self, *error: object) -> None:
        if self._remote:
            storage.write_text(self.place, "".join(self._lines))

    def _say(self, line: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {line}\n"
        if self._remote:
            self._lines.append(text)
        else:
            with open(self.place, "a", encoding="utf-8") as file:
                file.write(text)
