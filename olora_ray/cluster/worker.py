"""A Ray Train worker, from its entry point to its result: alone, in the group it finds, or in one after the other.

It trains step by step, evaluates, checkpoints, tells the driver, and ends when asked to.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import Any

import ray
import ray.train as ray_train
from ray.exceptions import RayError
from torch import Tensor

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Resumed, Saved, Started, Took, sent_to
from olora_ray.cluster.membership.peers import Peers, Progress, sync_state, through
from olora_ray.cluster.membership.state import Finished, Member
from olora_ray.cluster.resume import StartingPoint, self_tested, starting_point
from olora_ray.cluster.spec import LEFT, AnswerPair, TrainResult, TrainSpec
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext, note_kinds
from olora_ray.common import collectives, storage
from olora_ray.common.collectives import PeerLost
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.fault_points import reached
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import plural
from olora_ray.config.load import dump
from olora_ray.train.checkpoint import TrainState, perplexity
from olora_ray.train.checkpoints import CheckpointManager
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import StepResult, evaluate
from olora_ray.train.scoring import Baseline

logger = logging.getLogger(__name__)


# Requests to end or to change the group, as a worker sees them: from the driver, from Ray when a node is preempted, and
# from the membership.


SECONDS_BETWEEN_LINES = 15


class StopRequests:
    """Listens for stop requests between two steps, without waiting; one per worker."""

    def __init__(self, channel: Any, worker: WorkerContext, peers: Peers | None = None) -> None:
        self.channel, self.worker, self.peers = channel, worker, peers
        self.from_driver: str | None = None
        self._answer: Any = None  # of a call that is answered when the driver asks to stop
        self._looks = 0
        self._data_failed = False

    def pending(self) -> bool:
        """Whether this worker knows of a reason to end or to meet: all do, once one does (StepResult.signal)."""
        if self.worker.rank == 0:
            self._listen()
        meet = self.peers is not None and self.peers.orders().meet
        return meet or self.from_driver is not None or self.worker.preemption_announced()

    def decided(self) -> bool:
        """Whether the training is to end, not only the group to change; all must ask after a step with a signal."""
        return self.peers is None or collectives.from_first(self.from_driver) is not None

    def reason(self) -> tuple[str, bool]:
        """The reason, and whether it is a preemption; all workers must ask, after a step with a signal."""
        # Where workers come and go the driver looks for such nodes, and asks: Ray's answer is a barrier of all workers
        # that a trainer has started, and would wait for ever for one that is being replaced, or has left.
        preempted = () if self.peers else self.worker.preempted_nodes()
        if asked := collectives.from_first(self.from_driver):
            return asked, False
        return f"node {', '.join(node[:8] for node in preempted) or '?'} is preempted", True

    def waiting(self, shard: int, shards: int) -> None:
        """Called about once a second while a shard of the token store is not there yet.

        Raises UserError when it never will be.
        """
        # A worker gives up at its second look only: between the two it has looked for the shard once more, so
        # that it does not give up on one that another worker has found and trains on.
        if self._data_failed:
            raise UserError("the preparation of the training data has failed")
        try:
            self._data_failed = bool(ray.get(self.channel.data_failed.remote(), timeout=30))
        except RayError:
            self._data_failed = False  # Ray ends the workers of a driver that is gone
        if self.worker.rank == 0 and self._looks % SECONDS_BETWEEN_LINES == 0:
            self.channel.send.remote(f"waiting for shard {shard + 1} of {shards} of the token store")
        self._looks += 1

    def _listen(self) -> None:
        if self._answer is None:
            self._answer = self.channel.wait_for_stop.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            with contextlib.suppress(RayError):  # the channel is gone, and with it the driver: Ray ends its workers
                self.from_driver = ray.get(ready[0])


# The training.


class After(Enum):
    """What follows a step."""

    STEP = 1
    CHANGE = 2
    """Of the group."""
    STOP = 3
    """The driver or Ray has asked for it."""
    END = 4


class _Left(Exception):
    """This worker was ordered to leave."""


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
        peers: Peers | None = None,
        late: bool = False,
    ) -> None:
        """Raises UserError if the model does not pass its self-test; all workers must make one together.

        One that comes `late`, into a training that is under way, does so alone.
        """
        self.context, self.spec, self.config = context, spec, spec.config
        self.checkpoints, self.channel, self.peers, self.late = checkpoints, channel, peers, late
        self.stop_requests = stop_requests or StopRequests(channel, context)
        start = self_tested(context, spec, start, self.stop_requests.waiting)
        self.trainer, self.progress = start.trainer, Progress(start.state)
        self.trainer.signal = self.stop_requests.pending
        self.attention, self.resumed = start.attention, start.resumed
        self.state.kinds = note_kinds(self.state.kinds, context.device)
        self._precision = self.state.precision
        self.evaluator = Evaluator(context, spec, start)
        self.schedule = Schedule(self.config.train, spec.train, self.stop_requests.waiting)
        self.manager: CheckpointManager | None = None

    @property
    def state(self) -> TrainState:
        """Of the training."""
        return self.progress.state

    def run(self) -> TrainResult:
        """The whole of a worker's work."""
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
                logger.debug(f"the group is over: {lost}")
                self._meet(lost=True)
            except _Left:
                return TrainResult(interrupted=LEFT)

    def _begin(self) -> None:
        self._take_office()
        self._tell_driver(Took(self.evaluator.took))
        if self.resumed:
            self._tell_where()
        else:
            self._tell_driver(Started(self.context.world))
            self._checkpoint()  # what the initialisation made is never made again

    def _meet(self, lost: bool = False) -> None:
        """Go on in the next group, with the state of the worker that is furthest."""
        assert self.peers is not None
        while True:
            try:
                group = self.peers.next_group(lost)
                if group.begins:
                    raise RuntimeError("all other workers are gone")  # Ray starts this one again, with others
                self.progress = sync_state(self.progress, self.trainer, self.evaluator)
                if self.state.precision not in (None, self._precision):
                    # It came before a checkpoint said so; started again it reads one that does.
                    raise RuntimeError(f"the others compute in {self.state.precision}, not in {self._precision}")
                self.state.kinds = note_kinds(self.state.kinds, self.context.device)
                break
            except PeerLost:
                lost = True
        led = self.manager is not None
        self._take_office()
        self._tell_where(group.why)
        if not led and not self.progress.pending:
            self._checkpoint()  # the first worker of before may have been lost with it

    def _take_office(self) -> None:
        """The first worker writes the checkpoints, which one that was it before does no longer."""
        if self.context.rank > 0:
            if self.manager:  # this worker was given up meanwhile
                self.manager.abandon()
            self.manager = None
        elif self.manager is None:
            self.manager = CheckpointManager(
                self.checkpoints,
                self.config.train.keep,
                saved=lambda step, seconds: self._tell_driver(Saved(step, seconds)),
            )

    def _tell_where(self, why: str = "") -> None:
        total = self.schedule.total()
        self._tell_driver(Resumed(self.state.step, total, self.context.world, list(self.state.history), why))

    def _train(self) -> bool:
        """Steps, evaluations and checkpoints until the end; True if the driver or Ray has asked to stop."""
        if self.state.step == 0 and not self.state.history and not self.progress.pending:
            found = self.evaluator.baseline(storage.join(self.spec.shared or self.checkpoints, "baseline.json"))
            self.state.before = found.answers
            if found.loss is not None:
                self._tell(self.evaluator.note(self.state, found.loss))
        while (after := self._train_in_group()) is After.CHANGE:
            self._change_group()
        return after is After.STOP

    def _train_in_group(self) -> After:
        """Steps until something else follows."""
        pending = self.progress.pending
        if pending and (after := self._after_step(pending)) is not After.STEP:
            return after
        # A run that had stopped early and is resumed has nothing left to train.
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
        """Evaluate, tell and save what is due after a step; what follows."""
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
        """Leave, or meet the others, as was ordered."""
        assert self.peers is not None
        if self.peers.orders().leave:
            try:
                if self.manager:
                    self.manager.finish()
            except UserError:  # the manager has said why; that is no reason to end the others' training
                logger.warning("the worker that leaves could not write its last checkpoint; the next rank 0 writes one")
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
        found = self.trainer.loss.tested
        return TrainResult(
            state=self.state,
            stopped_early=not self.schedule.last(self.state.step),
            answers=answers,
            self_test=found.to_json() if found else None,
        )

    def _checkpoint(self) -> None:
        """Have the state of now saved; rank 0 writes, since all workers hold the same adapter and optimizer."""
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
        "train/step_seconds": result.seconds,
        "data/wait_fraction": result.waited / result.seconds,
    }


# Evaluation during a training: held-out loss, answers to held-out prompts, and the best adapter so far.


class Evaluator:
    """Measures the adapter that a worker trains. All workers must call each method together."""

    def __init__(self, context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> None:
        self.context, self.spec = context, spec
        self.trainer, self.attention = start.trainer, start.attention
        self.best: Tensor | None = start.best
        self.questions = wanted_questions(spec.config.evaluation, spec.eval)
        self.took = dict[str, float]()
        """Seconds, for the driver's estimate of the time that is left."""

    def measure(self, state: TrainState) -> dict[str, float]:
        """Evaluate the adapter of now, and note the result."""
        return self.note(state, self.loss(state.step))

    def note(self, state: TrainState, loss: float) -> dict[str, float]:
        """Take in a held-out loss, and keep the adapter if it is the best so far; returns the metrics to be told."""
        if state.note_evaluation(loss):
            self.best = self.trainer.flat.vector.clone()
        return {"eval/loss": loss, "eval/perplexity": perplexity(loss)}

    @contextlib.contextmanager
    def _best_in_place(self) -> Iterator[None]:
        """The best adapter in place of the last one, for the block; without evaluations that one stays.

        If other workers are lost meanwhile, the new group continues with the last adapter, and saves it.
        """
        vector = self.trainer.flat.vector
        last = vector.clone()
        try:
            if self.best is not None:
                vector.copy_(self.best)
            yield
        finally:
            vector.copy_(last)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.took[what] = time.monotonic() - began

    def loss(self, step: int) -> float:
        """Mean held-out loss per supervised token, after `step` steps; raises UserError if it is not finite."""
        assert self.spec.eval is not None
        with self.context.activate(self.trainer.adapted), self._timed("evaluation"):
            reached("evaluate", step, self.context.rank)
            rank, world = self.context.rank, self.context.world
            return evaluate(self.trainer, self.spec.eval, self.attention, rank, world, step)

    def answers(self, answering: str) -> list[list[int]]:
        """Answers to the held-out prompts as token ids; `answering` names the model for the log.

        A model that cannot answer is asked no more, unless scores are wanted: then that is a UserError.
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
        """The held-out prompts with the answers of before and of the best adapter."""
        if not self.questions:
            return ()
        with self._best_in_place():
            now = self.answers("fine-tuned model")
        if not self.questions:
            return ()
        pairs = zip(self.questions, before or [], now, strict=True)
        return tuple(AnswerPair(each.prompt, each.reference, tuple(old), tuple(new)) for each, old, new in pairs)

    def baseline(self, place: str) -> Baseline:
        """Loss and answers before the first step: read from `place` if an earlier attempt has measured them."""
        origin, first = self.spec.baseline_identity(), self.context.rank == 0
        found = collectives.from_first(Baseline.read(place, origin, len(self.questions)) if first else None)
        if found is None:
            logger.info("evaluating before the first step")
            loss = self.loss(0) if self.spec.eval else None
            start = "adapter that training starts with" if self.spec.config.train.start else "base model"
            found = Baseline(loss, self.answers(start) if self.questions else None)
            if first:
                found.write(place, origin)
        return found


# The entry point.


@dataclass(frozen=True)
class Entry:
    """Entry of a worker into a training whose workers may change."""

    first_rank: int
    """Number of the first worker that its trainer has started."""
    attempt: int
    """The driver's attempt."""


def train_worker(spec: TrainSpec, checkpoints: str, channel: Any, entry: Entry | None = None) -> TrainResult:
    """Entry point under TorchTrainer; the same on every worker, only the first reports.

    Without an `entry` the workers are, and stay, those of the process group that is there.
    """
    quiet_transformers()
    ray_internals.quiet_train_worker()
    context = RayTrainContext(spec.config)
    if entry is None:
        result = train_at(context, spec, checkpoints, channel)
        if result.problem is not None:  # of this worker alone, perhaps: the others wait for it in an exchange then
            ray.get(channel.finish.remote(result))
        return result
    with Peers(through(channel), _member(entry)) as peers:
        try:
            result = train_at(context, spec, checkpoints, channel, peers)
        except Finished:
            return TrainResult(interrupted=LEFT)
        if result.interrupted != LEFT:
            ray.get(channel.finish.remote(result))
        return result


def _member(entry: Entry) -> Member:
    """This worker of Ray Train."""
    from ray.util import get_node_ip_address

    context = ray.get_runtime_context()
    rank = entry.first_rank + ray_train.get_context().get_world_rank()
    place = collectives.meeting_place(get_node_ip_address())
    name, node = context.get_actor_id() or "", context.get_node_id()
    return Member(name, rank, place, node, process=os.getpid(), attempt=entry.attempt)


def train_at(
    context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any, peers: Peers | None = None
) -> TrainResult:
    """Train a spec; what the user has to mend is in the result.

    With `peers` the workers form the groups of a membership; without, they are those of the process group here.
    """
    late = peers is not None and peers.running()
    try:
        with sent_to(channel, peers.leads if peers else lambda: context.rank == 0):
            if peers and not late and not peers.next_group().begins:
                raise RuntimeError("the training has begun meanwhile")  # Ray starts this worker again
            logger.info("loading the base model")
            began, requests = time.monotonic(), StopRequests(channel, context, peers)
            start = starting_point(context, spec, checkpoints, requests.waiting)
            worker = Worker(context, spec, checkpoints, channel, start, requests, peers, late)
            worker.evaluator.took["start"] = time.monotonic() - began
            return worker.run()
    except UserError as error:
        if peers and peers.group is None:
            raise RuntimeError(str(error)) from error  # it came late and alone: the others train on
        # Returned, not raised: a retry would meet the same problem.
        return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
