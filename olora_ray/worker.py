"""What a Ray Train worker does: build its part, train, evaluate, checkpoint, answer."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from olora_ray import checkpoint
from olora_ray.adapter.distribute import InitReport, initialise
from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.config import Config, dump
from olora_ray.data.store import TokenStore
from olora_ray.errors import UserError
from olora_ray.model import BaseModel, check_attention, load_model, on_this_node
from olora_ray.quiet import quiet_train_worker, quiet_transformers
from olora_ray.train.feed import Feed, total_steps
from olora_ray.train.generate import Question, answer, questions
from olora_ray.train.loop import StepResult, Trainer, evaluate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.memory import keep_freed_memory
from olora_ray.train.parallel import spread
from olora_ray.train.state import TrainState


@dataclass(frozen=True)
class Task:
    """All that a worker needs; whatever is large lies under the storage path."""

    config: Config
    base: BaseModel
    eos: tuple[int, ...]
    """Token ids that end an answer."""
    train: TokenStore
    eval: TokenStore | None
    board: Any

    def identity(self) -> dict[str, str]:
        """Digests of what decides the numbers of a run."""
        return {
            "base": self.base.digest,
            "train data": self.train.digest,
            "eval data": self.eval.digest if self.eval else "",
            "adapter": self.config.adapter.model_dump_json(),
        }


@dataclass(frozen=True)
class Answered:
    """One held-out prompt with its answers, as token ids."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What training returns to the driver."""

    problem: str | None = None
    """Why training stopped, if the user has to act."""
    state: TrainState | None = None
    steps: int = 0
    """Steps of the full schedule."""
    answers: tuple[Answered, ...] = ()
    stopped_early: bool = False


def train_worker(parts: dict[str, Any]) -> Outcome:
    """Entry point under TorchTrainer; the same on every worker, only rank 0 reports."""
    quiet_transformers()
    quiet_train_worker()
    try:
        return Worker(parts["task"]).run()
    except UserError as error:
        # Returned, not raised: a retry would meet the same problem. All workers get here together.
        return Outcome(problem=str(error))


class Worker:
    """One training process."""

    def __init__(self, task: Task) -> None:
        self.task, self.config = task, task.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, math.floor(self.config.cluster.cpus_per_worker)))
            keep_freed_memory()
        self.total = total_steps(self.config.train, len(task.train))
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
            self._start()
        stopped = self._train()
        return self._finish(stopped)

    def _train(self) -> bool:
        """Steps, evaluations and checkpoints until the end; True if stopped early."""
        feed = Feed(self.task.train, self.config.train, self.config.run.seed, self.attention, self.rank, self.world)
        # A run that had stopped early and is taken up again has nothing left to train.
        end = self.state.step if self._stale() else self.total
        for result in self.trainer.steps(feed, self.state.step, end, self.total):
            self.state.step = result.step
            metrics = _metrics(result)
            last = result.step == self.total
            if self.task.eval and (last or result.step % self.config.train.eval_every == 0):
                metrics |= self._evaluate()
            self._tell(metrics)
            if last or self._stale() or result.step % self.config.train.checkpoint_every == 0:
                self._checkpoint(wait=last or self._stale())
            if self._stale():
                break
        return self.state.step < self.total

    def _stale(self) -> bool:
        limit = self.config.train.early_stop
        return limit is not None and self.state.stale >= limit

    def _start(self) -> None:
        """Measure the untouched base, then keep what the initialisation made."""
        metrics = self._evaluate() if self.task.eval else {}
        if self.asked:
            self._say(f"answering {len(self.asked)} held-out prompts with the base model")
            self.state.before = self._answer()
        if metrics:
            self._tell(metrics)
        self._checkpoint(wait=False)

    def _finish(self, stopped: bool) -> Outcome:
        if self.best is not None:
            self.trainer.flat.vector.copy_(self.best)
        answers: tuple[Answered, ...] = ()
        if self.asked:
            self._say(f"answering {len(self.asked)} held-out prompts with the fine-tuned model")
            pairs = zip(self.asked, self.state.before or [], self._answer(), strict=True)
            answers = tuple(Answered(q.prompt, q.reference, tuple(old), tuple(new)) for q, old, new in pairs)
        return Outcome(None, self.state, self.total, answers, stopped)

    def _evaluate(self) -> dict[str, float]:
        assert self.task.eval is not None
        value = evaluate(self.trainer, self.task.eval, self.attention, self.rank, self.world)
        if self.state.note_evaluation(value):
            self.best = self.trainer.flat.vector.clone()
        return {"eval/loss": value, "eval/perplexity": math.exp(min(value, 80.0))}

    def _factors(self, model: Any, restored: checkpoint.Checkpoint | None) -> dict[str, Factors]:
        adapter = self.config.adapter
        targets = find_targets(model, adapter.targets, adapter.rank)
        if restored:
            return {name: restored.adapter[name].factors for name in targets}
        factors, report = initialise(targets, adapter.method, adapter.rank, self.config.run.seed, self.device)
        self._say(_describe(adapter.method, report))
        return factors

    def _checkpoint(self, wait: bool) -> None:
        """Save and report; rank 0 writes, since all workers hold the same adapter and optimizer."""
        folder = None
        if self.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="olora-checkpoint-"))
            flat = self.trainer.flat
            earlier = self.best is not None and self.state.best_step != self.state.step
            checkpoint.save(
                folder,
                {name: layer.weights() for name, layer in self.trainer.adapted.items()},
                flat.named(self.best) if earlier and self.best is not None else None,
                self.trainer.optimizer.state(),
                self.state,
                self.task.identity(),
                dump(self.config),
            )
        modes = ray.train.CheckpointUploadMode
        ray.train.report(
            {"step": self.state.step},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
            checkpoint_dir_name=f"step-{self.state.step:07d}",
            checkpoint_upload_mode=modes.SYNC if wait else modes.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _restored(self) -> checkpoint.Checkpoint | None:
        latest = ray.train.get_checkpoint()
        if latest is None:
            return None
        with latest.as_directory() as folder:
            found = checkpoint.load(Path(folder))
        for what, digest in self.task.identity().items():
            if found.identity.get(what) != digest:
                raise UserError(
                    f"run.name: the checkpoint of {self.config.run.name!r} has another {what}; use a new run.name"
                )
        return found

    def _take_up(self, restored: checkpoint.Checkpoint) -> None:
        self.state = restored.state
        flat = self.trainer.flat
        flat.load(flat.vector, _named(restored.adapter))
        self.trainer.optimizer.load(restored.optimizer, self.state.step)
        if self.state.best_step is not None:
            self.best = flat.vector.clone()
            if restored.best is not None:
                flat.load(self.best, restored.best)
        self._say(f"resuming after step {self.state.step} of {self.total}")

    def _questions(self) -> list[Question]:
        wanted = self.config.evaluation.samples
        if self.config.evaluation.scorer:
            wanted = max(wanted, self.config.evaluation.rows)
        return questions(self.task.eval, wanted) if self.task.eval else []

    def _answer(self) -> list[list[int]]:
        limit = self.config.evaluation.max_new_tokens
        return answer(self.trainer, self.asked, limit, self.task.eos, self.rank, self.world)

    def _tell(self, metrics: dict[str, float]) -> None:
        row = self.state.record(self.state.step, metrics)
        if self.rank == 0:
            self.task.board.put.remote(row)

    def _say(self, line: str) -> None:
        if self.rank == 0:
            self.task.board.put.remote(line)


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
