"""Ray Tune's class of a trial, which runs a TrialRun.

A class and not a function, because Tune ends a function within moments, and the placement group of the trial's
workers then depends on a cleaner that may fail. Here Tune waits in `cleanup` until the workers have written a
checkpoint, ended, and given their resources back.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from ray import tune

from olora_ray.cluster.quiet import quiet_ray
from olora_ray.common import logs
from olora_ray.sweep.spec import ENDED, NUMBER, PROGRESS, WHOLE, SweepSpec, number_of
from olora_ray.sweep.trial import Ended, Measured, TrialRun

POINTER = "checkpoint.json"


class TrialFailed(Exception):
    """A trial has ended without a result; the search continues."""


class SearchTrial(tune.Trainable):
    """Starts the training when Tune asks for its first evaluation, and ends it when Tune stops the trial."""

    def setup(self, config: dict[str, Any], sweep_spec: SweepSpec) -> None:  # type: ignore[override]  # see with_parameters
        """`config` has the trial's number, and its draws."""
        quiet_ray()
        logging.getLogger("mlflow").setLevel(logging.ERROR)  # a warning per trial would hide the search
        # The trial's lines are in its own log.txt; what is the same for all trials, the driver says.
        logging.getLogger(logs.PACKAGE).addHandler(logging.NullHandler())
        logging.getLogger(logs.PACKAGE).propagate = False
        self.sweep_spec = sweep_spec
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, where the one of before has ended: what it has imported need not be imported again."""
        self.trial_run.end()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        draws = {name: value for name, value in config.items() if name != NUMBER}
        # PBT copies the other trial's config, number included; only trial_name still identifies this one.
        self.trial_run = TrialRun(self.sweep_spec, number_of(self.trial_name), draws)
        self.last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation; raises TrialFailed if there will be none."""
        item = self.trial_run.next()
        if isinstance(item, Ended):
            if item.status == "failed":
                raise TrialFailed(item.reason)
            return {**self.last, "done": True, ENDED: True}
        self.last = self._result(item)
        if item.step >= self.trial_run.total:
            ended = isinstance(self.trial_run.next(), Ended)
            return {**self.last, "done": ended, ENDED: ended}
        return dict(self.last)

    def _result(self, item: Measured) -> dict[str, Any]:
        space, total = self.trial_run.sweep_spec.space, self.trial_run.total
        # Of NaN schedulers make nothing, or the best: infinity is the worst value there is.
        worst = math.inf if space.better() == "min" else -math.inf
        value = worst if math.isnan(item.value) else item.value
        return {"step": item.step, "total": total, PROGRESS: WHOLE * item.step / total, space.metric: value}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the checkpoint of the last evaluation lies; Tune keeps this note, not the tensors."""
        note = {"checkpoints": self.trial_run.folder.checkpoints, "step": self.last.get("step", 0)}
        Path(checkpoint_dir, POINTER).write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]  # Tune gives the folder
        """Continue from a checkpoint of this trial, or take over that of a better one."""
        note = json.loads(Path(checkpoint, POINTER).read_text(encoding="utf-8"))
        # By the trial's number: the search may lie elsewhere than when this was written.
        owner = number_of(note["checkpoints"].rpartition("/")[0])
        self.trial_run.resume_from(owner, int(note["step"]))
        # A training that had stopped early measures nothing more, and a result without the metric ends Tune's search.
        if (measured := self.trial_run.last()) is not None:
            self.last = self._result(measured)

    def cleanup(self) -> None:
        """End the workers and wait for them."""
        self.trial_run.end()
