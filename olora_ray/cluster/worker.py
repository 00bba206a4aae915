"""A training worker: it trains, evaluates, writes checkpoints, reports to the driver, and ends on request.
It trains alone (a trial on a shared base), in a fixed group of Ray Train, or in the changing groups of a membership.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import ray
import ray.train as ray_train
from ray.exceptions import RayError
from torch import Tensor

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Resumed, Saved, Started, Took, sent_to
from olora_ray.cluster.failures import advice_for_memory
from olora_ray.cluster.membership.peers import Peers, Progress, sync_state, through
from olora_ray.cluster.membership.state import Finished, Member
from olora_ray.cluster.resume import StartingPoint, measure_first_step, self_tested, starting_point
from olora_ray.cluster.spec import LEFT, AnswerPair, TrainResult, TrainSpec
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext, note_kinds
from olora_ray.common import collectives, storage
from olora_ray.common.collectives import PeerLost
from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import plural
from olora_ray.config.load import dump
from olora_ray.train.checkpoint import TrainState, perplexity
from olora_ray.train.checkpoints import CheckpointManager, name_of
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import StepResult, evaluate, evaluate_examples
from olora_ray.train.scoring import Baseline

logger = logging.getLogger(__name__)


# Requests to end the training or to change the group. They come from the driver, from Ray when a node is preempted, and
# from the membership.


SECONDS_BETWEEN_LINES = 15


class StopRequests:
    def __init__(self, channel: Any, worker: WorkerContext, peers: Peers | None = None) -> None:
        self.channel, self.worker, self.peers = channel, worker, peers
        self.from_driver: str | None = None
        self._stop_call: Any = None  # returns when the driver asks to stop
        self._looks = 0
        self._data_failed = False

    def pending(self) -> bool:
        """True if this worker has a reason to end or to meet. The step's signal tells it to all (StepResult.signal)."""
        if self.worker.rank == 0:
            self._listen()
        meet = self.peers is not None and self.peers.orders().meet
        return meet or self.from_driver is not None or self.worker.preemption_announced()

    def decided(self) -> bool:
        """True if the training ends, False if only the group changes. All workers must call it after a signal."""
        return self.peers is None or collectives.from_first(self.from_driver) is not None

    def reason(self) -> tuple[str, bool]:
        """Return the reason, and whether it is a preemption. All workers must call it after a step with a signal."""
        # With a membership the driver itself looks for preempted nodes. `preempted_nodes` is a barrier of all workers
        # that a trainer has started: it would wait for ever for a worker that is being replaced or has left.
        preempted = () if self.peers else self.worker.preempted_nodes()
        if reason := collectives.from_first(self.from_driver):
            return reason, False
        return f"node {', '.join(node[:8] for node in preempted) or '?'} is preempted", True

    def waiting(self, shard: int, shards: int) -> None:
        """Check and log, about once a second, while a shard of the token store is missing.

        Raises UserError if the preparation of the data has failed.
        """
        # Raise only at the second look after the failure. Between the two looks the caller searches the shard once
        # more. So no worker raises for a shard that exists and that another worker already trains on.
        if self._data_failed:
            raise UserError("the preparation of the training data has failed")
        try:
            self._data_failed = bool(ray.get(self.channel.data_failed.remote(), timeout=30))
        except RayError:
            self._data_failed = False  # the driver has ended, so Ray ends this worker, too
        if self.worker.rank == 0 and self._looks % SECONDS_BETWEEN_LINES == 0:
            self.channel.send.remote(f"waiting for shard {shard + 1} of {shards} of the token store")
        self._looks += 1

    def _listen(self) -> None:
        if self._stop_call is None:
            self._stop_call = self.channel.wait_for_stop.remote()
        ready, _ = ray.wait([self._stop_call], timeout=0)
        if ready:
            with contextlib.suppress(RayError):  # the driver has ended with the channel, so Ray ends its workers
                self.from_driver = ray.get(ready[0])


# The training.


class After(Enum):
    STEP = 1
    CHANGE = 2
    STOP = 3
    """Stop early, at the request of the driver or of Ray."""
    END = 4


class _Left(Exception):
    """This worker leaves, as ordered by the membership."""


class Worker:
    """A training from its starting point to its result. All workers of a group must create theirs together.

    A worker that comes `late`, while others train, creates it alone. Raises UserError if the model fails its self-test.
    """

    def __init__(
        self,
        context: WorkerContext,
        spec: TrainSpec,
        checkpoints: str,
        channel: Any,
        start: StartingPoint,
        stop_requests: StopRequests | None = None,
        peers: Peers | None = None,
        late: bool = False,
    ) -> None:
        self.context, self.spec, self.config = context, spec, spec.config
        self.checkpoints, self.channel, self.peers, self.late = checkpoints, channel, peers, late
        self.stop_requests = stop_requests or StopRequests(channel, context)
        start = self_tested(context, spec, start, self.stop_requests.waiting)
        measure_first_step(context, spec, start, self.stop_requests.waiting)
        self.trainer, self.progress = start.trainer, Progress(start.state)
        self.trainer.signal = self.stop_requests.pending
        self.attention, self.resumed = start.attention, start.resumed
        self.state.kinds = note_kinds(self.state.kinds, context.device)
        self._precision = self.state.precision
        self.evaluator = Evaluator(context, spec, start)
        self.schedule = Schedule(self.config.train, spec.train, self.stop_requests.waiting, self.state.lr)
        self.manager: CheckpointManager | None = None

    @property
    def state(self) -> TrainState:
        return self.progress.state

    def run(self) -> TrainResult:
        if self.late:
            self._meet()
        else:
            self._begin()
        while True:
            try:
                return self._finish(self._train())
            except PeerLost as lost:
                if self.peers is None:
                    raise
                logger.debug(f"the group has ended: {lost}")
                self._meet(lost=True)
            except _Left:
                return TrainResult(interrupted=LEFT)

    def _begin(self) -> None:
        self._update_manager()
        self._tell_driver(Took(self.evaluator.took))
        if self.resumed:
            if (total := self.schedule.total()) is not None and total < self.state.step:
                raise UserError(
                    f"train.epochs: the run has already done {self.state.step} steps, and train.epochs="
                    f"{self.config.train.epochs:g} gives {total}; raise train.epochs or set train.steps"
                )
            self._report_resumed()
        else:
            self._tell_driver(Started(self.context.world))
            self._checkpoint()  # so that a restart does not repeat the initialisation

    def _meet(self, lost: bool = False) -> None:
        """Continue in the next group, with the state of the worker that is furthest."""
        assert self.peers is not None
        while True:
            try:
                group = self.peers.next_group(lost)
                if group.begins:
                    raise RuntimeError("all other workers are lost")  # Ray restarts this worker, together with others
                self.progress = sync_state(self.progress, self.trainer, self.evaluator)
                # This worker has loaded the base before a checkpoint had the run's precision. When Ray restarts it, it
                # reads the precision from one.
                if self.state.precision not in (None, self._precision):
                    raise RuntimeError(f"the other workers compute in {self.state.precision}, not in {self._precision}")
                self.state.kinds = note_kinds(self.state.kinds, self.context.device)
                self.schedule.auto = self.state.lr
                break
            except PeerLost:
                lost = True
        was_first = self.manager is not None
        self._update_manager()
        self._report_resumed(group.why)
        # The previous rank 0 may have been lost before it wrote the checkpoint of this step.
        if not was_first and not self.progress.pending:
            self._checkpoint()

    def _update_manager(self) -> None:
        """Let rank 0 write the checkpoints, and stop a worker that was rank 0 in the previous group from doing so."""
        if self.context.rank > 0:
            if self.manager:
                self.manager.abandon()
            self.manager = None
        elif self.manager is None:
            self.manager = CheckpointManager(
                self.checkpoints,
                self.config.train.keep,
                saved=lambda step, seconds: self._tell_driver(Saved(step, seconds)),
            )

    def _report_resumed(self, why: str = "") -> None:
        total = self.schedule.total()
        self._tell_driver(Resumed(self.state.step, total, self.context.world, list(self.state.history), why))

    def _train(self) -> bool:
        if self.state.step == 0 and not self.state.history and not self.progress.pending:
            baseline = self.evaluator.baseline(storage.join(self.spec.shared or self.checkpoints, "baseline.json"))
            self.state.before = baseline.answers
            if baseline.loss is not None:
                self._tell(self.evaluator.note(self.state, baseline.loss))
        while (after := self._train_in_group()) is After.CHANGE:
            self._change_group()
        return after is After.STOP

    def _train_in_group(self) -> After:
        # The previous group may have broken between a step and its evaluation.
        pending = self.progress.pending
        if pending and (after := self._after_step(pending)) is not After.STEP:
            return after
        # A run that has stopped early and is resumed has nothing left to train.
        if self._stale():
            return After.END
        loader = StepLoader(
            self.spec.train,
            self.config.train,
            self.config.run.seed,
            self.attention,
            self.context.rank,
            self.context.world,
            waiting=self.stop_requests.waiting,
        )
        with closing(self.trainer.steps(loader, self.state.step, self.schedule)) as steps:
            while True:
                with self.context.activate(self.trainer.adapted):
                    result = next(steps, None)
                if result is None:
                    return After.END
                self.state.step, self.progress.pending = result.step, result
                if (after := self._after_step(result)) is not After.STEP:
                    return after

    def _after_step(self, result: StepResult) -> After:
        metrics = _metrics(result)
        last = self.schedule.last(result.step)
        if self.spec.eval and (last or result.step % self.config.train.eval_every == 0):
            metrics |= self.evaluator.measure(self.state)
        self.progress.pending = None
        self._tell(metrics)
        end = last or self._stale()
        due = end or result.step % self.config.train.checkpoint_every == 0
        if due:
            self._checkpoint()
        if end or not result.signal:
            return After.END if end else After.STEP
        if not self.stop_requests.decided():
            return After.CHANGE
        if not due:
            self._checkpoint()
        return After.STOP

    def _change_group(self) -> None:
        assert self.peers is not None
        if self.peers.orders().leave:
            try:
                if self.manager:
                    self.manager.finish()
            except UserError:  # the manager has logged the reason, and the others must train on
                logger.warning("this worker leaves without its last checkpoint; the next rank 0 writes one")
            raise _Left
        self._meet()

    def _stale(self) -> bool:
        limit = self.config.train.early_stop
        return limit is not None and self.state.stale >= limit

    def _finish(self, interrupted: bool) -> TrainResult:
        problem: UserError | None = None
        try:
            if self.manager:
                self.manager.finish()
        except UserError as error:
            problem = error
        collectives.raise_together(problem)
        if interrupted:
            why, preempted = self.stop_requests.reason()
            return TrainResult(interrupted=why, preempted=preempted, state=self.state)
        answers = self.evaluator.answer_pairs(self.state.before)
        tested = self.trainer.loss.tested
        return TrainResult(
            state=self.state,
            stopped_early=not self.schedule.last(self.state.step),
            trainable=self.trainer.flat.vector.numel(),
            answers=answers,
            self_test=tested.to_json() if tested else None,
        )

    def _checkpoint(self) -> None:
        # Only rank 0 has a manager: all workers have the same adapter and optimizer, so one of them writes.
        if self.manager:
            write = self.trainer.snapshot(self.state, self.evaluator.best, self.spec.identity(), dump(self.config))
            self.manager.save(self.state.step, write)

    def _tell(self, metrics: dict[str, float]) -> None:
        if "eval/loss" in metrics:
            self._tell_driver(Took(self.evaluator.took))
        self._tell_driver(self.state.record(self.state.step, metrics))
        reached("step", self.state.step, self.context.rank)

    def _tell_driver(self, message: Any) -> None:
        if self.context.rank == 0:
            self.channel.send.remote(message)


def _metrics(result: StepResult) -> dict[str, float]:
    return {
        "train/loss": result.loss,
        "train/lr": result.lr,
        "train/grad_norm": result.grad_norm,
        "train/tokens_per_second": result.supervised / result.seconds,
        "train/all_tokens_per_second": result.tokens / result.seconds,
        "train/step_seconds": result.seconds,
        "data/wait_fraction": result.waited / result.seconds,
    }


Losses = TypeVar("Losses", float, list[float])

# Evaluation during a training: held-out loss, answers to held-out prompts, and the best adapter so far.


class Evaluator:
    """Evaluation of the adapter that a worker trains. All workers must call each method together."""

    def __init__(self, context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> None:
        self.context, self.spec = context, spec
        self.trainer, self.attention = start.trainer, start.attention
        self.best: Tensor | None = start.best
        self.questions = wanted_questions(spec.config.evaluation, spec.eval)
        self.took = dict[str, float]()
        """Durations in seconds, from which the driver estimates the remaining time."""

    def measure(self, state: TrainState) -> dict[str, float]:
        if not self.spec.each_example:
            return self.note(state, self.loss(state.step))
        assert self.spec.eval is not None
        state.examples = self._evaluated(evaluate_examples, state.step)
        return self.note(state, sum(state.examples) / self.spec.eval.manifest.supervised)

    def note(self, state: TrainState, loss: float) -> dict[str, float]:
        if state.note_evaluation(loss):
            self.best = self.trainer.flat.vector.clone()
        return {"eval/loss": loss, "eval/perplexity": perplexity(loss)}

    @contextlib.contextmanager
    def _best_in_place(self) -> Iterator[None]:
        """Use the best adapter during the block. Without an evaluation it is the last one."""
        # The last adapter returns even if workers are lost meanwhile: the next group continues with it, and saves it.
        vector = self.trainer.flat.vector
        last = vector.clone()
        try:
            if self.best is not None:
                vector.copy_(self.best)
            yield
        finally:
            vector.copy_(last)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.took[name] = time.monotonic() - began

    def loss(self, step: int) -> float:
        """Return the mean held-out loss per supervised token after `step` steps; raises UserError if not finite."""
        return self._evaluated(evaluate, step)

    def _evaluated(self, how: Callable[..., Losses], step: int) -> Losses:
        assert self.spec.eval is not None
        with self.context.activate(self.trainer.adapted), self._timed("evaluation"):
            reached("evaluate", step, self.context.rank)
            rank, world = self.context.rank, self.context.world
            return how(self.trainer, self.spec.eval, self.attention, rank, world, step)

    def answers(self, answering: str) -> list[list[int]]:
        """Return the answers to the held-out prompts as token ids. `answering` names the model in the log.

        If the model cannot answer, returns no answers now and later. With evaluation.scorer this is a UserError.
        """
        logger.info(f"answering {plural(len(self.questions), 'held-out prompt')} with the {answering}")
        limit = self.spec.config.evaluation.max_new_tokens
        with self.context.activate(self.trainer.adapted), self._timed("answers"):
            try:
                return answer(self.trainer, self.questions, limit, self.spec.eos, self.context.rank, self.context.world)
            except UserError as error:
                if self.spec.config.evaluation.scorer:
                    raise UserError(f"evaluation.scorer: {error}; leave it out") from None
                logger.warning(f"evaluation.samples: {error}: the training continues without answers")
                self.questions = []
                return []

    def answer_pairs(self, before: list[list[int]] | None) -> tuple[AnswerPair, ...]:
        if not self.questions:
            return ()
        with self._best_in_place():
            now = self.answers("fine-tuned model")
        if not self.questions:
            return ()
        pairs = zip(self.questions, before or [], now, strict=True)
        return tuple(AnswerPair(each.prompt, each.reference, tuple(old), tuple(new)) for each, old, new in pairs)

    def baseline(self, file: str) -> Baseline:
        """Return loss and answers before the first step, from `file` if an earlier attempt has written it."""
        origin, first = self.spec.baseline_identity(), self.context.rank == 0
        baseline = collectives.from_first(Baseline.read(file, origin, len(self.questions)) if first else None)
        if baseline is None:
            logger.info("evaluating before the first step")
            loss = self.loss(0) if self.spec.eval else None
            start = "adapter that training starts with" if self.spec.config.train.start else "base model"
            baseline = Baseline(loss, self.answers(start) if self.questions else None)
            if first:
                baseline.write(file, origin)
        return baseline


# The entry point.


@dataclass(frozen=True)
class Entry:
    first_rank: int
    """Number of the first worker of the same trainer."""
    attempt: int
    """The driver's attempt that started the worker."""


def train_worker(spec: TrainSpec, checkpoints: str, channel: Any, entry: Entry | None = None) -> TrainResult:
    """Run a worker of Ray Train. All workers return the same result, and only rank 0 reports progress.

    With an `entry` the workers form a membership. Without one they are a fixed group.
    """
    quiet_transformers()
    ray_internals.quiet_train_worker()
    context = RayTrainContext(spec.config)
    if entry is None:
        result = train_at(context, spec, checkpoints, channel)
        # If only this worker has a problem, the others wait for it in an exchange, and Ray Train does not return. So
        # the driver gets the problem over the channel.
        if result.problem is not None:
            ray.get(channel.finish.remote(result))
        _report(result)
        return result
    with Peers(through(channel), _member(entry)) as peers:
        try:
            result = train_at(context, spec, checkpoints, channel, peers)
        except Finished:
            return TrainResult(interrupted=LEFT)
        if result.interrupted != LEFT:
            ray.get(channel.finish.remote(result))
        ranks = {member.rank for member in peers.group.members} if peers.group else set()
    # The driver has the result. If a worker is lost now, so that the others wait in the report, it ends them. One that
    # has left before, or waits as a spare, would never come.
    if entry.first_rank == 0 and ranks.issuperset(range(ray_train.get_context().get_world_size())):
        _report(result)
    return result


def _report(result: TrainResult) -> None:
    """Give Ray Train the last metrics and checkpoint, for its `Result`. All workers of a trainer must call it together.

    Not during the training: Ray lets each report wait for all workers, and all but the first for its controller.
    """
    if result.state is None or result.interrupted:
        return
    metrics: dict[str, float] = {}
    for row in result.state.history:
        metrics |= row
    try:
        ray_internals.report(metrics, storage.join("checkpoints", name_of(result.state.step)))
    except Exception as error:  # the training is complete without it
        logger.warning(f"Ray Train's Result lacks the metrics of this run: {first_line(error)}")


def _member(entry: Entry) -> Member:
    from ray.util import get_node_ip_address

    context = ray.get_runtime_context()
    rank = entry.first_rank + ray_train.get_context().get_world_rank()
    store = collectives.meeting_place(get_node_ip_address())
    name, node = context.get_actor_id() or "", context.get_node_id()
    return Member(name, rank, store, node, process=os.getpid(), attempt=entry.attempt)


def train_at(
    context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any, peers: Peers | None = None
) -> TrainResult:
    """Train a spec. A UserError becomes the `problem` of the result.

    With `peers` the workers form the groups of a membership. Without, they are a fixed group.
    """
    late = peers is not None and peers.running()
    try:
        leads = peers.leads if peers else lambda: context.rank == 0
        with sent_to(channel, leads), advice_for_memory(spec.config):
            if peers and not late and not peers.next_group().begins:
                raise RuntimeError("the training has begun meanwhile")  # Ray restarts this worker, which then is late
            logger.info("loading the base model")
            began, requests = time.monotonic(), StopRequests(channel, context, peers)
            start = starting_point(context, spec, checkpoints, requests.waiting)
            worker = Worker(context, spec, checkpoints, channel, start, requests, peers, late)
            worker.evaluator.took["start"] = time.monotonic() - began
            return worker.run()
    except UserError as error:
        if peers and peers.group is None:
            raise RuntimeError(str(error)) from error  # this worker is late and alone: the others train on
        # Returned, not raised: Ray would restart the worker, which would meet the same problem again.
        return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
