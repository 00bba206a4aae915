"""Tune's callback and stopper of a search: logs a line per event, and ends the search when its patience is used up."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from ray import tune

from olora_ray.sweep import trial_file
from olora_ray.sweep.placement_groups import free_abandoned
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import ENDED, NUMBER, number_of

logger = logging.getLogger(__name__)

CLEANUP_SECONDS = 3.0


class SweepCallback(tune.Callback, tune.Stopper):
    """Logs one line per event, and counts trials that bring nothing better. Tune pickles it with the search."""

    def __init__(self, folder: str, space: Space, total: int) -> None:
        self.folder, self.space, self.total = folder, space, total
        self.best: tuple[float, int] | None = None
        """The best value of a trial that has ended, and that trial."""
        self.since_better = 0
        self.over: str | None = None
        """The reason for which the search ends before all trials have ended by themselves."""
        self._ended: set[str] = set()
        self._cleaned_at = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune asks after each result whether this trial is to stop."""
        return False

    def stop_all(self) -> bool:
        """Tune asks now and then whether the search is to end."""
        patience = self.space.patience
        if patience and self.since_better >= patience and not self.over:
            self.over = f"{self.since_better} trials in a row have brought nothing better"
            logger.info(f"the search ends: {self.over}")
        return self.over is not None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time while trials run."""
        if time.monotonic() - self._cleaned_at >= CLEANUP_SECONDS:
            self._cleaned_at = time.monotonic()
            if number := free_abandoned():
                logger.warning(f"resources of {number} ended trial(s) were not given back; they are now")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or continues from a checkpoint."""
        step = (trial.last_result or {}).get("step")
        again = f"continues after step {step}" if step else "starts"
        logger.info(f"trial {_number(trial)} {again}: {described(self._values(trial)) or 'the config as it is'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation."""
        value, step = result.get(self.space.metric), result.get("step")
        if value is None or result.get(ENDED):
            return
        logger.info(f"trial {_number(trial)} step {step}/{self.total} | {self.space.metric} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has finished, or was stopped."""
        result = trial.last_result or {}
        value, step = result.get(self.space.metric), result.get("step", 0)
        how = "finished" if result.get(ENDED) else f"stopped at step {step} ({self.over or self.space.scheduler.kind})"
        self._count(trial)
        if value is not None:
            self._note(value, _number(trial))
        shown = "" if value is None else f" with {self.space.metric} {value:.4f}"
        logger.info(f"trial {_number(trial)} {how}{shown}; {self._left()}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed."""
        self._count(trial)
        record = trial_file.read_all(self.folder).get(_number(trial))
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

    def _count(self, trial: Any) -> None:
        self._ended.add(trial.trial_id)
        self.since_better += 1

    def _note(self, value: float, number: int) -> None:
        sign = 1 if self.space.better() == "min" else -1
        gain = float("inf") if self.best is None else sign * (self.best[0] - value)
        if gain > self.space.min_improvement:
            self.since_better = 0
        if gain > 0:
            self.best = (value, number)

    def _left(self) -> str:
        best = f", the best of them trial {self.best[1]} with {self.best[0]:.4f}" if self.best else ""
        return f"{len(self._ended)} of {self.space.count()} trials have ended{best}"


def described(values: Mapping[str, Any]) -> str:
    """Values as a person reads them: `adapter.rank=16, train.lr=3.2e-04`."""
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _number(trial: Any) -> int:
    return number_of(str(trial))
