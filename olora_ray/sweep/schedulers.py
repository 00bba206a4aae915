"""Ray Tune's schedulers, adapted to searches.

ASHA measures time as the share of a trial's *own* steps, in percent. So a trial with more or fewer steps than the
others (another batch, number of epochs or length of sequences) is compared with them at the same share of its training,
and no trial ends before all its steps. Tune does not save a scheduler with a search: when a search is resumed, ASHA
learns from the trials' records again.

Where all trials see the same rows in the same steps, ASHA compares their training losses: of the same rows, so that
differences of a few steps say much (docs/generated/benchmarks.md#searches), and without an evaluation.
"""

import contextlib
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from olora_ray.sweep import record
from olora_ray.sweep.spec import PAIRED, PROGRESS, WHOLE, SweepSpec, number_of, trial_path


def scheduler(sweep_spec: SweepSpec) -> TrialScheduler:
    space = sweep_spec.space
    settings = space.scheduler
    if settings.kind == "none":
        return FIFOScheduler()
    # Slightly less, because of rounding: a third of 100, times 3, exceeds 100 in floats, and a trial would miss a rung.
    grace = min(WHOLE, WHOLE * sweep_spec.grace() / sweep_spec.total()) * (1 - 1e-9)
    length: dict[str, Any] = {"max_t": WHOLE, "grace_period": grace}  # Ray's annotations say int
    paired = space.paired()
    kind = Paired if paired else Halving
    halving = kind(PROGRESS, reduction_factor=settings.reduction, **length)
    halving.folder = sweep_spec.folder
    halving.measured = PAIRED if paired else space.metric
    return halving


class Halving(ASHAScheduler):
    """Asynchronous successive halving over the share of a trial's own steps."""

    folder = ""
    measured = ""
    """Key of the results that are compared."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        # The trial is new, or it ran before an interruption: then its earlier results count again.
        kept = None
        with contextlib.suppress(OSError):  # raising would make Tune start the whole search again
            kept = record.read_record(trial_path(self.folder, number_of(trial)))
        if kept is None or not kept.total:
            return
        points = kept.compared if self.measured == PAIRED else kept.curve
        for step, value in points:
            if step:
                result = {PROGRESS: WHOLE * step / kept.total, self.measured: value}
                self.on_trial_result(tune_controller, trial, result)


class Paired(Halving):
    """The same over training losses of the same rows. For Tune its metric is that of the search."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if PAIRED not in result:
            return TrialScheduler.CONTINUE
        compared = {PROGRESS: result[PROGRESS], self.metric: result[PAIRED]}
        decision = super().on_trial_result(tune_controller, trial, compared)
        # Trial 0 is the unchanged config, which the report compares with the best trial, at the same number of steps.
        if number_of(trial) == 0:
            return TrialScheduler.CONTINUE
        return str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last value of the metric is no training loss."""
