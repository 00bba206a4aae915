"""What a Ray Train worker does: build its part, train, evaluate, checkpoint, answer."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from olora_ray.adapter import factor_cache
from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.adapter.initialise import InitReport, initialise
from olora_ray.adapter.inject import find_targets, wrap
from olora_ray.cluster.channel import Resumed, Saved, Started, sent_to
from olora_ray.cluster.spec import AnswerPair, TrainResult, TrainSpec
from olora_ray.cluster.stop_requests import StopRequests
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext
from olora_ray.common import collectives, storage
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import quiet_train_worker, quiet_transformers
from olora_ray.config.load import dump
from olora_ray.model.load import check_attention
from olora_ray.train import checkpoint
from olora_ray.train import checkpoints as keeper
from olora_ray.train.baseline import Baseline
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loader import StepLoader
from olora_ray.train.loop import StepResult, Trainer, evaluate
from olora_ray.train.parallel import place_model
from olora_ray.train.schedule import Schedule
from olora_ray.train.state import TrainState

logger = logging.getLogger(__name__)


def train_worker(parts: dict[str, Any]) -> TrainResult:
    """Entry point under TorchTrainer; the same on every worker, only rank 0 reports."""
    quiet_transformers()
    quiet_train_worker()
    return train_at(RayTrainContext(parts["spec"].config), parts["spec"], parts["checkpoints"], parts["channel"])


def train_at(context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Train a spec; what the user has to mend is in the outcome."""
    try:
        with sent_to(channel if context.rank == 0 else None):
            return Worker(spec, checkpoints, context, channel).run()
    except UserError as error:
        # Returned, not raised: a retry would meet the same problem. All workers get here together.
        return TrainResult(problem=str(error))


class Worker:
    """One training process."""

    def __init__(self, spec: TrainSpec, checkpoints: str, context: WorkerContext, channel: Any) -> None:
        self.spec, self.config, self.checkpoints = spec, spec.config, checkpoints
        self.context, self.channel = context, channel
        self.rank, self.world, self.device = context.rank, context.world, context.device
        self.stop_requests = StopRequests(channel, self.rank, context.preemption)
        self.schedule = Schedule(self.config.train, spec.train, self.stop_requests.waiting)
        self.keeper = self._keeper() if self.rank == 0 else None
        self.state = TrainState()
        self.best: Tensor | None = None
        self.asked = wanted_questions(self.config.evaluation, spec.eval)

    def run(self) -> TrainResult:
        """The whole of a worker's work."""
        restored = self._restored()
        start = self._start() if restored is None else None
        known = restored.adapter if restored else start
        adapter = self.config.adapter
        with self.context.activate({}):
            loss = self.context.base(self.spec)
            model: Any = loss.model
            self.attention: str = model.config._attn_implementation
            check_attention(model.config.get_text_config(), self.attention, self.config.data)
            adapted = wrap(model, self._factors(model, known), adapter.scale(), adapter.dropout)
        with self.context.activate(adapted):
            place_model(loss, self.config.cluster.strategy, self.device)
            self.trainer = Trainer(loss, adapted, self.config, self.device)
        if restored:
            self._take_up(restored)
        else:
            if start:
                self.trainer.flat.load(self.trainer.flat.vector, _named(start))
            self._tell_driver(Started(self.world))
            self._checkpoint()  # what the initialisation made is never made again
        if self.state.step == 0 and not self.state.history:
            self._measure_base()
        return self._finish(self._train())

    def _train(self) -> bool:
        """Steps, evaluations and checkpoints until the end; True if the driver or Ray has asked to stop."""
        feed = StepLoader(
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
        steps = self.trainer.steps(feed, self.state.step, self.schedule)
        while (result := self._next(steps)) is not None:
            self.state.step = result.step
            metrics = _metrics(result)
            last = self.schedule.last(result.step)
            if self.spec.eval and (last or result.step % self.config.train.eval_every == 0):
                metrics |= self._evaluate()
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

    def _measure_base(self) -> None:
        """Loss and answers of the untouched base; an earlier attempt may have measured them."""
        place = storage.join(self.spec.shared or self.checkpoints, "baseline.json")
        found = collectives.from_first(
            Baseline.read(place, self.spec.base_identity(), len(self.asked)) if self.rank == 0 else None
        )
        if found is None:
            loss = self._held_out_loss() if self.spec.eval else None
            if self.asked:
                start = "adapter that training starts with" if self.config.train.start else "base model"
                logger.info(f"answering {len(self.asked)} held-out prompts with the {start}")
            found = Baseline(loss, self._answer() if self.asked else None)
            if self.rank == 0:
                found.write(place, self.spec.base_identity())
        self.state.before = found.answers
        if found.loss is not None:
            self._tell(self._note_evaluation(found.loss))

    def _finish(self, interrupted: bool) -> TrainResult:
        problem = None
        try:
            if self.keeper:
                self.keeper.finish()
        except UserError as error:
            problem = str(error)
        collectives.raise_together(problem)
        if interrupted:
            why, preempted = self.stop_requests.reason()
            return TrainResult(interrupted=why, preempted=preempted, state=self.state)
        if self.best is not None:
            self.trainer.flat.vector.copy_(self.best)
        answers: tuple[AnswerPair, ...] = ()
        if self.asked:
            logger.info(f"answering {len(self.asked)} held-out prompts with the fine-tuned model")
            pairs = zip(self.asked, self.state.before or [], self._answer(), strict=True)
            answers = tuple(AnswerPair(q.prompt, q.reference, tuple(old), tuple(new)) for q, old, new in pairs)
        return TrainResult(state=self.state, stopped_early=not self.schedule.last(self.state.step), answers=answers)

    def _evaluate(self) -> dict[str, float]:
        return self._note_evaluation(self._held_out_loss())

    def _held_out_loss(self) -> float:
        assert self.spec.eval is not None
        with self.context.activate(self.trainer.adapted):
            return evaluate(self.trainer, self.spec.eval, self.attention, self.rank, self.world)

    def _note_evaluation(self, loss: float) -> dict[str, float]:
        if self.state.note_evaluation(loss):
            self.best = self.trainer.flat.vector.clone()
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 80.0))}

    def _factors(self, model: Any, known: dict[str, AdapterWeights] | None) -> dict[str, Factors]:
        adapter = self.config.adapter
        targets = find_targets(model, adapter.targets, adapter.rank)
        if known:
            return {name: known[name].factors for name in targets}
        if self.spec.shared:
            began = time.perf_counter()
            if found := factor_cache.read(self.spec.shared, self.spec.factor_origin(), adapter.rank, list(targets)):
                logger.info(
                    f"{adapter.method} factors taken from those of the search in {time.perf_counter() - began:.2f} s"
                )
                return found
        factors, report = initialise(targets, adapter.method, adapter.rank, self.config.run.seed, self.device)
        logger.info(_describe(adapter.method, report))
        return factors

    def _keeper(self) -> keeper.CheckpointManager:
        return keeper.CheckpointManager(
            self.checkpoints,
            self.config.train.keep,
            saved=lambda step, seconds: self._tell_driver(Saved(step, seconds)),
        )

    def _checkpoint(self) -> None:
        """Have the state of now saved; rank 0 writes, since all workers hold the same adapter and optimizer."""
        if self.keeper:
            self.keeper.save(self.state.step, self._snapshot())

    def _snapshot(self) -> Callable[[Path], None]:
        """A function that writes the state of now, later."""
        flat, state, identity = self.trainer.flat, self.state, self.spec.identity()
        vector = flat.named(flat.vector.detach().to("cpu", copy=True))
        adapter = {
            name: AdapterWeights(_on_cpu(layer.weights().factors), vector[f"{name}.da"], vector[f"{name}.db"])
            for name, layer in self.trainer.adapted.items()
        }
        optimizer = {name: part.detach().to("cpu", copy=True) for name, part in self.trainer.optimizer.state().items()}
        best = None
        if self.best is not None and state.best_step != state.step:
            best = flat.named(self.best.to("cpu"))  # a new one is made when it changes
        state = replace(state, history=list(state.history))
        text = dump(self.config)
        return lambda folder: checkpoint.save(folder, adapter, best, optimizer, state, identity, text)

    def _restored(self) -> checkpoint.Checkpoint | None:
        """The newest good checkpoint, the same on all workers; raises UserError if it is of something else."""
        found = keeper.latest_good(self.checkpoints) if self.rank == 0 else None
        place = collectives.from_first(found[0] if found else None)
        if place is None:
            return None
        problem, restored = None, found[1] if found else None
        try:
            restored = restored or keeper.read(place)
        except UserError as error:
            problem = f"run.storage: worker {self.rank} cannot use what worker 0 can: {error}"
        collectives.raise_together(problem)
        assert restored is not None
        checkpoint.require_same(restored.identity, self.spec.identity(), place)
        return restored

    def _start(self) -> dict[str, AdapterWeights] | None:
        """The adapter of train.start; raises UserError if it is of another base or has other settings."""
        place = self.config.train.start
        if place is None:
            return None
        problem, found = None, None
        try:
            found = keeper.read(place)
            wanted = self.spec.identity()
            if other := [what for what in ("base model", "adapter") if found.identity.get(what) != wanted[what]]:
                problem = f"train.start: {place} was trained with another {' and another '.join(other)}"
        except UserError as error:
            problem = f"train.start: {error}"
        collectives.raise_together(problem)
        assert found is not None
        return found.best_adapter()

    def _take_up(self, restored: checkpoint.Checkpoint) -> None:
        self.state = restored.state
        flat = self.trainer.flat
        flat.load(flat.vector, _named(restored.adapter))
        self.trainer.optimizer.load(restored.optimizer, self.state.step)
        if self.state.best_step is not None:
            self.best = flat.vector.clone()
            if restored.best is not None:
                flat.load(self.best, restored.best)
        total = self.schedule.total()
        self._tell_driver(Resumed(self.state.step, total, self.world, list(self.state.history)))

    def _answer(self) -> list[list[int]]:
        limit = self.config.evaluation.max_new_tokens
        with self.context.activate(self.trainer.adapted):
            return answer(self.trainer, self.asked, limit, self.spec.eos, self.rank, self.world)

    def _tell(self, metrics: dict[str, float]) -> None:
        self._tell_driver(self.state.record(self.state.step, metrics))

    def _tell_driver(self, message: Any) -> None:
        if self.rank == 0:
            self.channel.send.remote(message)


def _on_cpu(factors: Factors) -> Factors:
    return Factors(factors.a0.cpu(), None if factors.b0 is None else factors.b0.cpu(), factors.full_rank)


def _metrics(result: StepResult) -> dict[str, float]:
    return {
        "train/loss": result.loss,
        "train/lr": result.lr,
        "train/grad_norm": result.grad_norm,
        "train/tokens_per_second": result.supervised / result.seconds,
        "train/step_seconds": result.seconds,
        "data/wait_fraction": result.waited / result.seconds,
    }


def _named(adapter: dict[str, AdapterWeights]) -> dict[str, Tensor]:
    parts = {f"{name}.da": weights.da for name, weights in adapter.items()}
    return parts | {f"{name}.db": weights.db for name, weights in adapter.items()}


def _describe(method: str, report: InitReport) -> str:
    shares = ", ".join(
        f"worker {worker}: {layers} layers in {seconds:.2f} s"
        for worker, (layers, seconds) in enumerate(zip(report.layers, report.seconds, strict=True))
    )
    line = f"{method} initialisation: {shares}; exchange {report.exchange_seconds:.2f} s; digest {report.digest[:12]}"
    if report.deficient:
        names = ", ".join(report.deficient[:4]) + (" ..." if len(report.deficient) > 4 else "")
        line += f"; rank-deficient, completed with orthonormal columns: {names}"
    return line
