"""What a Ray Train worker does: build its part, train, evaluate, checkpoint, answer."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray import checkpoint, keeper, storage
from olora_ray.adapter.distribute import InitReport, initialise, raise_together
from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.baseline import Baseline
from olora_ray.board import Resumed, Saved, Started
from olora_ray.config import dump
from olora_ray.errors import UserError
from olora_ray.listener import Listener
from olora_ray.model import check_attention, load_model, on_this_node
from olora_ray.quiet import quiet_train_worker, quiet_transformers
from olora_ray.task import Answered, Outcome, Task
from olora_ray.train.feed import Feed
from olora_ray.train.generate import Question, answer, questions
from olora_ray.train.loop import StepResult, Trainer, evaluate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.memory import keep_freed_memory
from olora_ray.train.parallel import spread
from olora_ray.train.schedule import Schedule
from olora_ray.train.state import TrainState

Value = TypeVar("Value")


def train_worker(parts: dict[str, Any]) -> Outcome:
    """Entry point under TorchTrainer; the same on every worker, only rank 0 reports."""
    quiet_transformers()
    quiet_train_worker()
    try:
        return Worker(parts["task"], parts["checkpoints"]).run()
    except UserError as error:
        # Returned, not raised: a retry would meet the same problem. All workers get here together.
        return Outcome(problem=str(error))


class Worker:
    """One training process."""

    def __init__(self, task: Task, checkpoints: str) -> None:
        self.task, self.config, self.checkpoints = task, task.config, checkpoints
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, math.floor(self.config.cluster.cpus_per_worker)))
            keep_freed_memory()
        self.listener = Listener(task.board, self.rank)
        self.schedule = Schedule(self.config.train, task.train, self.listener.waiting)
        self.keeper = self._keeper() if self.rank == 0 else None
        self.state = TrainState()
        self.best: Tensor | None = None
        self.asked = self._questions()

    def run(self) -> Outcome:
        """The whole of a worker's work."""
        restored = self._restored()
        base = on_this_node(self.task.base, self.config)
        model: Any = load_model(base.folder, self.config.model, self.device)
        self.attention: str = model.config._attn_implementation
        check_attention(model.config.get_text_config(), self.attention, self.config.data)
        adapted = inject(
            model, self._factors(model, restored), self.config.adapter.scale(), self.config.adapter.dropout
        )
        loss = SupervisedLoss(model)
        spread(loss, self.config.cluster.strategy, self.device)
        self.trainer = Trainer(loss, adapted, self.config, self.device)
        if restored:
            self._take_up(restored)
        else:
            self._tell_driver(Started(self.world))
            self._checkpoint()  # what the initialisation made is never made again
        if self.state.step == 0 and not self.state.history:
            self._measure_base()
        return self._finish(self._train())

    def _train(self) -> bool:
        """Steps, evaluations and checkpoints until the end; True if the driver or Ray has asked to stop."""
        feed = Feed(
            self.task.train,
            self.config.train,
            self.config.run.seed,
            self.attention,
            self.rank,
            self.world,
            waiting=self.listener.waiting,
        )
        # A run that had stopped early and is taken up again has nothing left to train.
        if self._stale():
            return False
        for result in self.trainer.steps(feed, self.state.step, self.schedule):
            self.state.step = result.step
            metrics = _metrics(result)
            last = self.schedule.last(result.step)
            if self.task.eval and (last or result.step % self.config.train.eval_every == 0):
                metrics |= self._evaluate()
            self._tell(metrics)
            end = last or self._stale()
            if end or result.signal or result.step % self.config.train.checkpoint_every == 0:
                self._checkpoint()
            if end or result.signal:
                return not end
            self.trainer.signal = self.listener.wants_stop()
        return False

    def _stale(self) -> bool:
        limit = self.config.train.early_stop
        return limit is not None and self.state.stale >= limit

    def _measure_base(self) -> None:
        """Loss and answers of the untouched base; an earlier attempt may have measured them."""
        place = storage.join(self.checkpoints, "baseline.json")
        found = self._shared(Baseline.read(place, self.task.identity(), len(self.asked)) if self.rank == 0 else None)
        if found is None:
            loss = (
                evaluate(self.trainer, self.task.eval, self.attention, self.rank, self.world)
                if self.task.eval
                else None
            )
            if self.asked:
                self._say(f"answering {len(self.asked)} held-out prompts with the base model")
            found = Baseline(loss, self._answer() if self.asked else None)
            if self.rank == 0:
                found.write(place, self.task.identity())
        self.state.before = found.answers
        if found.loss is not None:
            self._tell(self._note_evaluation(found.loss))

    def _finish(self, interrupted: bool) -> Outcome:
        problem = None
        try:
            if self.keeper:
                self.keeper.finish()
        except UserError as error:
            problem = str(error)
        raise_together(problem)
        if interrupted:
            why, preempted = self.listener.why()
            return Outcome(interrupted=why, preempted=preempted, state=self.state)
        if self.best is not None:
            self.trainer.flat.vector.copy_(self.best)
        answers: tuple[Answered, ...] = ()
        if self.asked:
            self._say(f"answering {len(self.asked)} held-out prompts with the fine-tuned model")
            pairs = zip(self.asked, self.state.before or [], self._answer(), strict=True)
            answers = tuple(Answered(q.prompt, q.reference, tuple(old), tuple(new)) for q, old, new in pairs)
        return Outcome(state=self.state, stopped_early=not self.schedule.last(self.state.step), answers=answers)

    def _evaluate(self) -> dict[str, float]:
        assert self.task.eval is not None
        return self._note_evaluation(evaluate(self.trainer, self.task.eval, self.attention, self.rank, self.world))

    def _note_evaluation(self, loss: float) -> dict[str, float]:
        if self.state.note_evaluation(loss):
            self.best = self.trainer.flat.vector.clone()
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 80.0))}

    def _factors(self, model: Any, restored: checkpoint.Checkpoint | None) -> dict[str, Factors]:
        adapter = self.config.adapter
        targets = find_targets(model, adapter.targets, adapter.rank)
        if restored:
            return {name: restored.adapter[name].factors for name in targets}
        factors, report = initialise(targets, adapter.method, adapter.rank, self.config.run.seed, self.device)
        self._say(_describe(adapter.method, report))
        return factors

    def _keeper(self) -> keeper.Keeper:
        return keeper.Keeper(
            self.checkpoints,
            self.config.train.keep,
            self._say,
            saved=lambda step, seconds: self._tell_driver(Saved(step, seconds)),
        )

    def _checkpoint(self) -> None:
        """Have the state of now saved; rank 0 writes, since all workers hold the same adapter and optimizer."""
        if self.keeper:
            self.keeper.save(self.state.step, self._snapshot())

    def _snapshot(self) -> Callable[[Path], None]:
        """A function that writes the state of now, later."""
        flat, state, identity = self.trainer.flat, self.state, self.task.identity()
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
        found = keeper.newest(self.checkpoints, self._say) if self.rank == 0 else None
        place = self._shared(found[0] if found else None)
        if place is None:
            return None
        problem, restored = None, found[1] if found else None
        try:
            restored = restored or keeper.read(place)
        except UserError as error:
            problem = f"run.storage: worker {self.rank} cannot use what worker 0 can: {error}"
        raise_together(problem)
        assert restored is not None
        checkpoint.require_same(restored.identity, self.task.identity(), place)
        return restored

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

    def _questions(self) -> list[Question]:
        wanted = self.config.evaluation.samples
        if self.config.evaluation.scorer:
            wanted = max(wanted, self.config.evaluation.rows)
        return questions(self.task.eval, wanted) if self.task.eval else []

    def _answer(self) -> list[list[int]]:
        limit = self.config.evaluation.max_new_tokens
        return answer(self.trainer, self.asked, limit, self.task.eos, self.rank, self.world)

    def _tell(self, metrics: dict[str, float]) -> None:
        self._tell_driver(self.state.record(self.state.step, metrics))

    def _say(self, line: str) -> None:
        self._tell_driver(line)

    def _tell_driver(self, message: Any) -> None:
        if self.rank == 0:
            self.task.board.put.remote(message)

    def _shared(self, value: Value) -> Value:
        """The value of rank 0, on all workers."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values, src=0)
        return values[0]


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
