"""The process of a Ray Train worker: trains step by step, checkpoints, tells the driver, and ends when asked to."""

from collections.abc import Iterator
from typing import Any

from olora_ray.cluster.channel import Resumed, Saved, Started, sent_to
from olora_ray.cluster.evaluator import Evaluator
from olora_ray.cluster.kind import note_kinds
from olora_ray.cluster.quiet import quiet_train_worker
from olora_ray.cluster.resume import StartingPoint, starting_point
from olora_ray.cluster.self_tested import self_tested
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.stop_requests import StopRequests
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext
from olora_ray.common import collectives, storage
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config.load import dump
from olora_ray.train.checkpoint import snapshot
from olora_ray.train.checkpoints import CheckpointManager
from olora_ray.train.loader import StepLoader
from olora_ray.train.loop import StepResult
from olora_ray.train.schedule import Schedule


def train_worker(spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Entry point under TorchTrainer; the same on every worker, only rank 0 reports."""
    quiet_transformers()
    quiet_train_worker()
    return train_at(RayTrainContext(spec.config), spec, checkpoints, channel)


def train_at(context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Train a spec; what the user has to mend is in the result."""
    try:
        with sent_to(channel if context.rank == 0 else None):
            requests = StopRequests(channel, context.rank, context.preemption)
            start = starting_point(context, spec, checkpoints, requests.waiting)
            return Worker(context, spec, checkpoints, channel, start, requests).run()
    except UserError as error:
        # Returned, not raised: a retry would meet the same problem. All workers get here together.
        return TrainResult(problem=str(error))


class Worker:
    """One training process, from its starting point to its result."""

    def __init__(
        self,
        context: WorkerContext,
        spec: TrainSpec,
        checkpoints: str,
        channel: Any,
        start: StartingPoint,
        stop_requests: StopRequests | None = None,
    ) -> None:
        """Raises UserError if the model does not pass its self-test; all workers must make one together."""
        self.context, self.spec, self.config = context, spec, spec.config
        self.checkpoints, self.channel = checkpoints, channel
        self.rank, self.world = context.rank, context.world
        self.stop_requests = stop_requests or StopRequests(channel, self.rank, context.preemption)
        start = self_tested(context, spec, start, self.stop_requests.waiting)
        self.trainer, self.state = start.trainer, start.state
        self.attention, self.resumed = start.attention, start.resumed
        self.state.kinds = note_kinds(self.state.kinds, context.device)
        self.evaluator = Evaluator(context, spec, start)
        self.schedule = Schedule(self.config.train, spec.train, self.stop_requests.waiting)
        self.manager = self._checkpoint_manager() if self.rank == 0 else None

    def run(self) -> TrainResult:
        """The whole of a worker's work."""
        if self.resumed:
            total = self.schedule.total()
            self._tell_driver(Resumed(self.state.step, total, self.world, list(self.state.history)))
        else:
            self._tell_driver(Started(self.world))
            self._checkpoint()  # what the initialisation made is never made again
        if self.state.step == 0 and not self.state.history:
            self._measure_base()
        return self._finish(self._train())

    def _measure_base(self) -> None:
        found = self.evaluator.baseline(storage.join(self.spec.shared or self.checkpoints, "baseline.json"))
        self.state.before = found.answers
        if found.loss is not None:
            self._tell(self.evaluator.note(self.state, found.loss))

    def _train(self) -> bool:
        """Steps, evaluations and checkpoints until the end; True if the driver or Ray has asked to stop."""
        loader = StepLoader(
            self.spec.train,
            self.config.train,
            self.config.run.seed,
            self.attention,
            self.rank,
            self.world,
            waiting=self.stop_requests.waiting,
        )
        # A run that had stopped early and is resumed has nothing left to train.
        if self._stale():
            return False
        steps = self.trainer.steps(loader, self.state.step, self.schedule)
        while (result := self._next(steps)) is not None:
            self.state.step = result.step
            metrics = _metrics(result)
            last = self.schedule.last(result.step)
            if self.spec.eval and (last or result.step % self.config.train.eval_every == 0):
                metrics |= self.evaluator.measure(self.state)
            self._tell(metrics)
            end = last or self._stale()
            if end or result.signal or result.step % self.config.train.checkpoint_every == 0:
                self._checkpoint()
            if end or result.signal:
                return not end
            self.trainer.signal = self.stop_requests.pending()
        return False

    def _next(self, steps: Iterator[StepResult]) -> StepResult | None:
        with self.context.activate(self.trainer.adapted):
            return next(steps, None)

    def _stale(self) -> bool:
        limit = self.config.train.early_stop
        return limit is not None and self.state.stale >= limit

    def _finish(self, interrupted: bool) -> TrainResult:
        problem = None
        try:
            if self.manager:
                self.manager.finish()
        except UserError as error:
            problem = str(error)
        collectives.raise_together(problem)
        if interrupted:
            why, preempted = self.stop_requests.reason()
            return TrainResult(interrupted=why, preempted=preempted, state=self.state)
        self.evaluator.use_best()
        answers = self.evaluator.answer_pairs(self.state.before)
        found = self.trainer.loss.tested
        return TrainResult(
            state=self.state,
            stopped_early=not self.schedule.last(self.state.step),
            answers=answers,
            self_test=found.to_json() if found else None,
        )

    def _checkpoint_manager(self) -> CheckpointManager:
        return CheckpointManager(
            self.checkpoints,
            self.config.train.keep,
            saved=lambda step, seconds: self._tell_driver(Saved(step, seconds)),
        )

    def _checkpoint(self) -> None:
        """Have the state of now saved; rank 0 writes, since all workers hold the same adapter and optimizer."""
        if self.manager:
            write = snapshot(self.trainer, self.state, self.evaluator.best, self.spec.identity(), dump(self.config))
            self.manager.save(self.state.step, write)

    def _tell(self, metrics: dict[str, float]) -> None:
        self._tell_driver(self.state.record(self.state.step, metrics))
        reached("step", self.state.step, self.rank)

    def _tell_driver(self, message: Any) -> None:
        if self.rank == 0:
            self.channel.send.remote(message)


def _metrics(result: StepResult) -> dict[str, float]:
    return {
        "train/loss": result.loss,
        "train/lr": result.lr,
        "train/grad_norm": result.grad_norm,
        "train/tokens_per_second": result.supervised / result.seconds,
        "train/step_seconds": result.seconds,
        "data/wait_fraction": result.waited / result.seconds,
    }
