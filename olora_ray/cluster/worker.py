"""A training worker: it trains, evaluates, writes checkpoints, reports to the driver, and ends on request.
It trains alone (a trial on a shared base) or in a group of Ray Train. If one of a group is lost, the driver starts
another group, which resumes from the newest checkpoint.
"""

import contextlib
import logging
import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Saved, Started, give_signs_of_life, sent_to
from olora_ray.cluster.device_errors import advice_for_device
from olora_ray.cluster.ladder import fitted
from olora_ray.cluster.spec import GUARD, AnswerPair, TrainResult, TrainSpec
from olora_ray.cluster.start import (
    StartingPoint,
    measure_first_step,
    named,
    start_adapter,
    starting_point,
)
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext, record_platforms
from olora_ray.common import collectives, storage
from olora_ray.common.collectives import PeerLost
from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import plural
from olora_ray.config.load import dump
from olora_ray.tokens.plan import CHOSEN, Counts
from olora_ray.train import reference
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.checkpoints import CheckpointManager, name_of
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.held_out import by_source, evaluate
from olora_ray.train.loader import Schedule, StepLoader, known_steps
from olora_ray.train.loop import StepResult
from olora_ray.train.price import peak_of
from olora_ray.train.scoring import Baseline
from olora_ray.train.self_test import check_pair

logger = logging.getLogger(__name__)


# Requests of the driver to end the training.


class StopRequests:
    def __init__(self, channel: Any, worker: WorkerContext) -> None:
        self.channel = channel
        self.worker = worker
        self.from_driver: str | None = None
        self._stop_call: Any = None  # returns when the driver asks to stop

    def pending(self) -> bool:
        """True on rank 0 if the driver asks to stop. The step's signal tells it to all (StepResult.signal)."""
        if self.worker.rank == 0:
            self._listen()
        return self.from_driver is not None

    def reason(self) -> str:
        """Return the driver's reason. All workers must call it after a step with a signal."""
        return collectives.from_first(self.from_driver) or "the driver asks to stop"

    def _listen(self) -> None:
        if self._stop_call is None:
            self._stop_call = self.channel.wait_for_stop.remote()
        ready, _ = ray.wait([self._stop_call], timeout=0)
        if ready:
            # After an error the driver has ended with the channel, so Ray ends its workers.
            with contextlib.suppress(RayError):
                self.from_driver = ray.get(ready[0])


# The training.


MOST_LOST = 30.0
"""Seconds of training that a lost worker may cost, where a checkpoint every so often takes less than `SHARE` of it."""
SHARE = 0.01
STEPS_TO_COMPARE = 20
"""Last steps whose medians are compared between the workers."""
SETTLED = 2
"""Step of a worker after which its memory and its time are compared with the plan; the first one warms up."""
SLOW = 1.5
"""A worker is slow if it computes longer than this many times the median of all workers."""


class Worker:
    """A training from its starting point to its result. All workers of a group must create theirs together.

    Raises UserError if the model fails its self-test.
    """

    def __init__(
        self,
        context: WorkerContext,
        spec: TrainSpec,
        checkpoints: str,
        channel: Any,
        start: StartingPoint,
        stop_requests: StopRequests | None = None,
    ) -> None:
        spec, start = fitted(context, spec, start)
        self.context = context
        self.spec = spec
        self.config = spec.config
        self.checkpoints = checkpoints
        self.channel = channel
        self.stop_requests = stop_requests or StopRequests(channel, context)
        measure_first_step(context, spec, start)
        self.trainer = start.trainer
        self.trainer.signal = self.stop_requests.pending
        self.state = start.state
        self.attention = start.attention
        self.resumed = start.resumed
        self.state.kinds = record_platforms(self.state.kinds, context.device)
        if self.trainer.objective.reference:
            self._give_reference()
        self.evaluator = Evaluator(context, spec, start)
        self.schedule = Schedule(self.config.train, spec.train, self.state.lr)
        # Only rank 0 has a manager: all workers have the same adapter and optimizer, so one of them writes.
        self.manager = None
        if context.rank == 0:
            self.manager = CheckpointManager(checkpoints, self.config.train.keep, self._saved)
        self._saved_at = time.monotonic()
        self._saving = math.inf
        self._saved_step = self.state.step if self.resumed else -1
        self._began = self.state.step
        self._computed = deque[Sequence[float]](maxlen=STEPS_TO_COMPARE)
        """Seconds of each worker in the last steps."""
        self._slow_said = False
        layers = self.trainer.adapted.values()
        # The makers' peaks are those of bfloat16. How many experts a token has is not known here.
        model: Any = self.trainer.loss.model
        known = model.dtype is torch.bfloat16 and all(layer.da.dim() == 2 for layer in layers)
        self._peak = 0.0
        if known and context.device.type == "cuda":
            self._peak = context.world * (
                peak_of(torch.cuda.get_device_name(context.device)) or 0.0
            )
        # Of the adapted layers: 2 per number and token in each forward pass, and in the backward pass, because frozen
        # weights have no gradient.
        passes = self.trainer.objective.forwards + 1.0
        numbers = sum(layer.db.shape[-2] * layer.da.shape[-1] for layer in layers)
        self._operations = 2.0 * passes * numbers

    def run(self) -> TrainResult:
        self._begin()
        return self._finish(self._train())

    def _saved(self, step: int, seconds: float) -> None:
        self._saving = seconds
        self._tell_driver(Saved(step, seconds))

    def _give_reference(self) -> None:
        """Give the stores the losses before the first step; a resumed run gets those with which it began."""
        spec = self.spec
        flat = self.trainer.flat
        now = flat.vector.clone()
        with self.context.activate(self.trainer.adapted):
            if self.resumed:
                flat.vector.zero_()
                started = start_adapter(spec)
                if started:
                    flat.load(flat.vector, named(started))
            stores = (spec.train, spec.eval)
            origin = spec.reference_origin()
            reference.give(self.trainer, stores, self.attention, origin, self.state.reference)
            self._check_pair()
            flat.vector.copy_(now)

    def _check_pair(self) -> None:
        store = self.spec.train
        known = (store[number] for number in range(len(store)))
        pack = next((pack for pack in known if CHOSEN in pack.roles), None)
        if pack is not None:
            loss, adapted = self.trainer.loss, self.trainer.adapted
            train, device = self.config.train, self.context.device
            collectives.together(
                lambda: check_pair(loss, adapted, pack, train, self.attention, device)
            )

    def _begin(self) -> None:
        if not self.resumed:
            self._tell_driver(Started(self.context.world))
            self._checkpoint()  # so that a restart does not repeat the initialisation
            return
        total = known_steps(self.config.train, self.spec.train)
        if total is not None and total < self.state.step:
            raise UserError(
                f"train.epochs: the run has already done {self.state.step} steps, and train.epochs="
                f"{self.config.train.epochs:g} gives {total}; raise train.epochs or set train.steps"
            )
        self._tell_driver(Started(self.context.world, self.state.step, list(self.state.history)))

    def _train(self) -> bool:
        """Train to the end, or to a stop on request; True in the second case."""
        if self.state.shrunk is not None:
            if self.state.best_step is None:
                self._tell(self.evaluator.measure(self.state))
                self._saved_step = -1  # the checkpoint of this step lacks the loss
                self._checkpoint()
            return False
        if self.state.step == 0 and not self.state.history:
            baseline = self.evaluator.baseline(
                storage.join(self.spec.shared or self.checkpoints, "baseline.json")
            )
            self.state.before = baseline.answers
            if baseline.loss is not None:
                means = baseline.means or {"loss": baseline.loss}
                self._tell(self.evaluator.note(self.state, means))
        # A run that has stopped early and is resumed has nothing left to train.
        if self._stale():
            return False
        loader = StepLoader(
            self.spec.train,
            self.config.train,
            self.config.run.seed,
            self.attention,
            self.context.rank,
            self.context.world,
        )
        if self.context.device.type == "cuda":  # before this the model was tested and evaluated
            torch.cuda.reset_peak_memory_stats(self.context.device)
        with closing(self.trainer.steps(loader, self.state.step, self.schedule)) as steps:
            while True:
                with self.context.activate(self.trainer.adapted):
                    result = next(steps, None)
                if result is None:
                    return False
                self.state.step = result.step
                if self._after_step(result):
                    return False
                if result.signal:
                    self._checkpoint()
                    return True

    def _after_step(self, result: StepResult) -> bool:
        """Evaluate, report and save as due; return whether this was the last step."""
        began = time.perf_counter()
        last = self.schedule.last(result.step)
        for_shards = time.perf_counter() - began
        seconds = result.seconds + for_shards
        waited = max(times.waited for times in result.times) + for_shards
        metrics = {
            **{f"train/{name}": value for name, value in result.means.items()},
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens_per_second": result.supervised / seconds,
            "train/all_tokens_per_second": result.tokens / seconds,
            "train/step_seconds": seconds,
            # A worker may have waited while rank 0 still wrote a checkpoint.
            "data/wait_fraction": min(1.0, waited / seconds),
        }
        if self._peak:
            operations = metrics["train/all_tokens_per_second"] * self._operations
            metrics["train/mfu"] = operations / self._peak
            metrics["train/share_of_peak"] = metrics["train/mfu"]  # its old name, for one release
        beside_plan = {}
        if self.context.device.type == "cuda" and result.step == self._began + SETTLED:
            beside_plan = self._beside_plan(seconds)
        if self.spec.eval and (last or result.step % self.config.train.eval_every == 0):
            metrics |= self.evaluator.measure(self.state)
        self._tell(metrics, self._pace(result) | beside_plan)
        end = last or self._stale()
        overdue = time.monotonic() - self._saved_at >= max(MOST_LOST, self._saving / SHARE)
        if end or overdue or result.step % self.config.train.checkpoint_every == 0:
            self._checkpoint()
        return end

    def _pace(self, result: StepResult) -> dict[str, float]:
        """Return the metrics that show a slow worker or exchange, and tell the driver once if this worker is slow.

        Empty in the first step.
        """
        computed = [times.computed for times in result.times]
        if not any(computed):
            return {}
        # Medians of steps: neither one long step nor a worker with much text in one step is a slow worker.
        self._computed.append(computed)
        medians = [statistics.median(seconds) for seconds in zip(*self._computed, strict=True)]
        with_work = [seconds for seconds in medians if seconds]
        own = medians[self.context.rank]
        usual = statistics.median_low(with_work)
        if own > SLOW * usual and len(self._computed) == STEPS_TO_COMPARE and not self._slow_said:
            # All workers have the same numbers. Each speaks for itself, because it knows its machine.
            self._slow_said = True
            self.channel.send.remote(
                f"worker {self.context.rank} on {socket.gethostname()} is slow, and each step waits for it: it computes"
                f" for {own:.2g} s, the others for {usual:.2g} s (medians of {STEPS_TO_COMPARE} steps)"
            )
        return {
            "train/slowest_worker_seconds": max(with_work),
            "train/fastest_worker_seconds": min(with_work),
            # The last worker to come waits for nobody.
            "train/exchange_seconds": min(times.exchanged for times in result.times),
        }

    def _beside_plan(self, seconds: float) -> dict[str, float]:
        """Tell the driver memory and time of the first steps beside the plan; return the memory as metrics."""
        device = self.context.device
        memory = {
            "train/gpu_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "train/gpu_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
        if self.spec.planned:
            memory["train/gpu_planned_gib"] = self.spec.planned / 2**30
            peak, reserved, planned = memory.values()
            line = f"GPU memory: planned {planned:.1f} GiB, measured {peak:.1f} ({reserved:.1f} reserved)"
            if self.spec.step_seconds:
                line += (
                    f"; a step: planned {self.spec.step_seconds:.2g} s, measured {seconds:.2g} s"
                )
            self._tell_driver(line)
        return memory

    def _stale(self) -> bool:
        limit = self.config.train.early_stop
        return limit is not None and self.state.stale >= limit

    def _finish(self, interrupted: bool) -> TrainResult:
        collectives.together(lambda: self.manager.finish() if self.manager else None)
        if interrupted:
            return TrainResult(interrupted=self.stop_requests.reason(), state=self.state)
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
        if self.manager and self._saved_step != self.state.step:
            self._saved_at = time.monotonic()
            self._saved_step = self.state.step
            write = self.trainer.snapshot(
                self.state, self.evaluator.best, self.spec.identity(), dump(self.config)
            )
            self.manager.save(self.state.step, write)

    def _tell(self, metrics: dict[str, float], more: Mapping[str, float] | None = None) -> None:
        """Report metrics; the checkpoints' history lacks `more`."""
        self._tell_driver({**self.state.record(self.state.step, metrics), **(more or {})})
        reached("step", self.state.step, self.context.rank)

    def _tell_driver(self, message: Any) -> None:
        if self.context.rank == 0:
            self.channel.send.remote(message)


# Evaluation during a training: held-out loss, answers to held-out prompts, and the best adapter so far.


class Evaluator:
    """Evaluation of the adapter that a worker trains. All workers must call each method together."""

    def __init__(self, context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> None:
        self.context = context
        self.spec = spec
        self.trainer = start.trainer
        self.attention = start.attention
        self.best: Tensor | None = start.best
        self.questions = wanted_questions(spec.config.evaluation, spec.eval)
        self.sources: Mapping[str, tuple[list[int], Counts]] = {}
        if spec.eval and spec.eval_sources:
            self.sources = by_source(spec.eval, spec.eval_sources)

    def measure(self, state: TrainState) -> dict[str, float]:
        means, losses = self.evaluate(state.step, self.spec.each_example)
        if self.spec.each_example:
            state.examples = losses
        return self.note(state, means)

    def note(self, state: TrainState, means: Mapping[str, float]) -> dict[str, float]:
        """Note an evaluation, and return its metrics; the first of the means decides which step is the best."""
        if state.note_evaluation(next(iter(means.values()))):
            self.best = self.trainer.flat.vector.clone()
        return self.trainer.objective.evaluated(means)

    def evaluate(self, step: int, each: bool = False) -> tuple[dict[str, float], list[float]]:
        """Return the objective's means after `step` steps, and the losses of parts, with `each` of each example.

        Raises UserError if a loss is not finite.
        """
        assert self.spec.eval is not None
        with self.context.activate(self.trainer.adapted):
            reached("evaluate", step, self.context.rank)
            each = each or bool(self.sources)
            found = evaluate(self.trainer, self.spec.eval, self.attention, step, each)
            means = dict(found.means)
            if self.spec.guard:
                guard = evaluate(self.trainer, self.spec.guard, self.attention, step)
                means[GUARD.removeprefix("eval/")] = guard.means["loss"]
        objective = self.trainer.objective
        for source, (rows, size) in self.sources.items():
            numbers = (found.numbers[rows].sum(0) / objective.weight(size)).tolist()
            means[f"loss/{source}"] = objective.named(numbers, size)["loss"]
        return means, found.losses()

    def answers(self, answering: str) -> list[list[int]]:
        """Return the answers to the held-out prompts as token ids. `answering` names the model in the log.

        If the model cannot answer, returns no answers now and later. With evaluation.scorer this is a UserError.
        """
        logger.info(
            f"answering {plural(len(self.questions), 'held-out prompt')} with the {answering}"
        )
        limit = self.spec.config.evaluation.max_new_tokens
        with self.context.activate(self.trainer.adapted):
            try:
                return answer(
                    self.trainer,
                    self.questions,
                    limit,
                    self.spec.eos,
                    self.context.rank,
                    self.context.world,
                )
            except UserError as error:
                if self.spec.config.evaluation.scorer:
                    raise UserError(f"evaluation.scorer: {error}; leave it out") from None
                logger.warning(
                    f"evaluation.samples: {error}: the training continues without answers"
                )
                self.questions = []
                return []

    def answer_pairs(self, before: list[list[int]] | None) -> tuple[AnswerPair, ...]:
        if not self.questions:
            return ()
        # The best adapter answers. Without an evaluation it is the last one.
        vector = self.trainer.flat.vector
        last = vector.clone()
        try:
            if self.best is not None:
                vector.copy_(self.best)
            now = self.answers("fine-tuned model")
        finally:
            vector.copy_(last)
        if not self.questions:
            return ()
        pairs = zip(self.questions, before or [], now, strict=True)
        return tuple(
            AnswerPair(each.prompt, each.reference, tuple(old), tuple(new))
            for each, old, new in pairs
        )

    def baseline(self, file: str) -> Baseline:
        """Return loss and answers before the first step, from `file` if an earlier attempt has written it."""
        origin = self.spec.baseline_identity()
        first = self.context.rank == 0
        known = Baseline.read(file, origin, len(self.questions)) if first else None
        fields = collectives.from_first(None if known is None else asdict(known))
        if fields is not None:
            return Baseline(**fields)
        logger.info("evaluating before the first step")
        loss = means = None
        if self.spec.eval:
            means, _ = self.evaluate(0)
            loss = next(iter(means.values()))
        answers = None
        if self.questions:
            started = self.spec.config.train.start
            answers = self.answers("adapter that training starts with" if started else "base model")
        baseline = Baseline(loss, answers, means)
        if first:
            baseline.write(file, origin)
        return baseline


# The entry point.


def train_worker(spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Run a worker of Ray Train. All workers return the same result, and only rank 0 reports progress."""
    quiet_transformers()
    ray_internals.quiet_train_worker()
    context = RayTrainContext(spec.config)
    give_signs_of_life(channel, context.rank)
    try:
        result = train_at(context, spec, checkpoints, channel)
    except PeerLost:
        # Ray or the driver sees why the other worker was lost, and ends this process with the group. Until then say
        # nothing: the traceback of a consequence would hide the cause.
        time.sleep(spec.config.cluster.silence + 10.0)
        raise
    # If only this worker has a problem, the others wait for it in an exchange, and Ray Train does not return. So the
    # driver gets the problem over the channel.
    if result.problem is not None:
        ray.get(channel.finish.remote(result))
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


def train_at(
    context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any
) -> TrainResult:
    """Train a spec. A UserError becomes the `problem` of the result."""
    try:
        with (
            sent_to(channel, lambda: context.rank == 0),
            advice_for_device(spec.config, context.device, spec.planned) as progress,
        ):
            logger.info("loading the base model")
            requests = StopRequests(channel, context)
            start = starting_point(context, spec, checkpoints)
            progress.state = start.state
            progress.began = start.state.step
            worker = Worker(context, spec, checkpoints, channel, start, requests)
            progress.config = worker.config
            return worker.run()
    except UserError as error:
        # Returned, not raised: the next group would meet the same problem again.
        return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
