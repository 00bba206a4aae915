"""Tune's callback and stopper of a search: logs a line per event, and ends the search when its patience is used up."""

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray import tune

from olora_ray.cluster.resources import free_abandoned
from olora_ray.sweep import record as trial_file
from olora_ray.sweep import state
from olora_ray.sweep import state as progress
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import ENDED, NUMBER, number_of, trial_place

logger = logging.getLogger(__name__)

CLEANUP_SECONDS = 1.0
"""How often the room of trials that were stopped is given back: their controllers die with them."""
NOTE_SECONDS = 60.0
"""How often the seconds so far are written while no trial starts or ends."""

_LIVE: list["SweepCallback"] = []
"""The callback of the search that this process runs: of several, one after the other, that of the last."""


class SweepCallback(tune.Callback, tune.Stopper):
    """Logs one line per event, counts trials that bring nothing better, and ends the search at its limits.

    Tune pickles it with the search, once as callback and once as stopper. Both unpickle as the callback that the
    process already has: there is one, with the limits of today's space file, and the place of today.
    """

    def __init__(self, folder: str, space: Space) -> None:
        self.folder, self.space = folder, space
        self.best: tuple[float, int] | None = None
        """The best value of a trial that has ended, and that trial."""
        self.since_better = 0
        self.over: str | None = None
        """The reason for which the search ends before all trials have ended by themselves."""
        self.cut: set[int] = set()
        """Trials that were under way when a limit ended the search."""
        self._ended: set[str] = set()
        self._trials: list[Any] = []
        self._cleaned_at = 0.0
        self._before, self._began = progress.read(folder).seconds, time.monotonic()
        self._noted_at = self._began
        _LIVE[:] = [self]

    def __reduce__(self) -> tuple[Any, ...]:
        return _live, (self.folder, self.space)

    def seconds(self) -> float:
        """Seconds of the search so far, over all attempts."""
        return self._before + time.monotonic() - self._began

    def complete(self) -> bool:
        """Whether the search is over: at a limit, or because all trials have ended."""
        return self.over is not None or len(self._ended) >= self.space.count()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune asks after each result whether this trial is to stop."""
        return False

    def stop_all(self) -> bool:
        """Tune asks now and then whether the search is to end."""
        if not self.over and (reason := self._limit()):
            self.over = reason
            # Tune stops all that have not ended, and tells no callback.
            self.cut |= {_number(trial) for trial in self._trials if not trial.is_finished()}
            self._note_seconds()
            logger.info(f"the search ends: {self.over}")
        return self.over is not None

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        """Called before the first trial; raises UserError for a search that could not be resumed.

        Tune begins that anew, with as many trials as a search has that says nothing: one of Optuna's.
        """
        if total_num_samples is not None and total_num_samples < self.space.count():
            raise state.not_resumed(self.folder)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time while trials run, before `stop_all`."""
        self._trials = trials

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time while trials run."""
        if time.monotonic() - self._cleaned_at >= CLEANUP_SECONDS:
            self._cleaned_at = time.monotonic()
            free_abandoned()
        if time.monotonic() - self._noted_at >= NOTE_SECONDS:
            self._note_seconds()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or continues from a checkpoint."""
        step = (trial.last_result or {}).get("step")
        again = f"continues after step {step}" if step else "starts"
        logger.info(f"trial {_number(trial)} {again}: {described(self._values(trial)) or 'the config as it is'}")
        self._note_seconds()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation."""
        value, step = result.get(self.space.metric), result.get("step")
        if value is None or result.get(ENDED):
            return
        logger.info(f"trial {_number(trial)} step {step}/{result.get('total')} | {self.space.metric} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has finished, or was stopped."""
        result = trial.last_result or {}
        record = self._record(trial)
        step = f"step {result.get('step', 0)}"
        how = "finished" if result.get(ENDED) else f"stopped at {step} ({self.over or self.space.scheduler.kind})"
        if self.over and not result.get(ENDED):
            self.cut.add(_number(trial))
        self._count(trial)
        shown = ""
        if record and record.value is not None and record.measured():
            self._note(record.value, record.number)
            shown = f" with {self.space.metric} {record.value:.4f}"
        logger.info(f"trial {_number(trial)} {how}{shown}; {self._left()}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed."""
        self._count(trial)
        record = self._record(trial)
        why = record.reason if record and record.reason else "its process died"
        logger.info(f"trial {_number(trial)} failed: {why}; {self._left()}")

    def get_state(self) -> dict[str, Any]:
        """State that Tune saves with the search."""
        return {"best": self.best, "since_better": self.since_better, "ended": sorted(self._ended)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore `get_state` after an interruption."""
        best = state.get("best")
        self.best = None if best is None else (float(best[0]), int(best[1]))
        self.since_better, self._ended = int(state.get("since_better", 0)), set(state.get("ended", ()))

    def _values(self, trial: Any) -> dict[str, Any]:
        draws = {name: value for name, value in trial.config.items() if name != NUMBER}
        return {} if self.space.has_default() and _number(trial) == 0 else self.space.values(draws)

    def _limit(self) -> str | None:
        patience, budget = self.space.patience, self.space.time_budget
        if patience and self.since_better >= patience:
            return f"{self.since_better} trials in a row have brought nothing better"
        if budget and self.seconds() >= budget:
            return f"the time budget of {budget:g} s is used up"
        return None

    def _record(self, trial: Any) -> TrialRecord | None:
        """What the trial itself has written down, which is what the leaderboard will show."""
        try:
            return trial_file.read(trial_place(self.folder, _number(trial)))
        except OSError:  # Tune would count the trial as failed; its line lacks the value
            return None

    def _count(self, trial: Any) -> None:
        self._ended.add(trial.trial_id)
        self.since_better += 1
        self._note_seconds()

    def _note(self, value: float, number: int) -> None:
        """`value` is the best of a trial, and finite."""
        sign = 1 if self.space.better() == "min" else -1
        gain = float("inf") if self.best is None else sign * (self.best[0] - value)
        if gain > self.space.min_improvement:
            self.since_better = 0
        if gain > 0:
            self.best = (value, number)

    def _note_seconds(self) -> None:
        self._noted_at = time.monotonic()
        with contextlib.suppress(OSError):  # the next note has it; the search does not depend on it
            progress.write(self.folder, progress.Progress(self.seconds()))

    def _left(self) -> str:
        best = f", the best of them trial {self.best[1]} with {self.best[0]:.4f}" if self.best else ""
        return f"{len(self._ended)} of {self.space.count()} trials have ended{best}"


def _live(folder: str, space: Space) -> SweepCallback:
    """What a pickled callback becomes; `folder` is where the search was then."""
    return _LIVE[0] if _LIVE else SweepCallback(folder, space)


def described(values: Mapping[str, Any]) -> str:
    """Values as a person reads them: `adapter.rank=16, train.lr=3.2e-04`."""
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _number(trial: Any) -> int:
    return number_of(str(trial))
