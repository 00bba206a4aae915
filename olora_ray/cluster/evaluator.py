"""Evaluation during a training: held-out loss, answers to held-out prompts, and the best adapter so far."""

import contextlib
import logging
from collections.abc import Iterator

from torch import Tensor

from olora_ray.cluster.resume import StartingPoint
from olora_ray.cluster.spec import AnswerPair, TrainSpec
from olora_ray.cluster.worker_context import WorkerContext
from olora_ray.common import collectives
from olora_ray.common.fault_points import reached
from olora_ray.common.text import plural
from olora_ray.train.checkpoint import TrainState, perplexity
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loop import evaluate
from olora_ray.train.scoring import Baseline

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures the adapter that a worker trains. All workers must call each method together."""

    def __init__(self, context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> None:
        self.context, self.spec = context, spec
        self.trainer, self.attention = start.trainer, start.attention
        self.best: Tensor | None = start.best
        self.questions = wanted_questions(spec.config.evaluation, spec.eval)

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

        Where others are lost meanwhile, the last one is what a new group goes on with, and saves.
        """
        vector = self.trainer.flat.vector
        last = vector.clone()
        try:
            if self.best is not None:
                vector.copy_(self.best)
            yield
        finally:
            vector.copy_(last)

    def loss(self, step: int) -> float:
        """Mean held-out loss per supervised token, after `step` steps; raises UserError if it is not finite."""
        assert self.spec.eval is not None
        with self.context.activate(self.trainer.adapted):
            reached("evaluate", step, self.context.rank)
            rank, world = self.context.rank, self.context.world
            return evaluate(self.trainer, self.spec.eval, self.attention, rank, world, step)

    def answers(self, answering: str) -> list[list[int]]:
        """Answers to the held-out prompts as token ids; `answering` names the model for the log."""
        logger.info(f"answering {plural(len(self.questions), 'held-out prompt')} with the {answering}")
        limit = self.spec.config.evaluation.max_new_tokens
        with self.context.activate(self.trainer.adapted):
            return answer(self.trainer, self.questions, limit, self.spec.eos, self.context.rank, self.context.world)

    def answer_pairs(self, before: list[list[int]] | None) -> tuple[AnswerPair, ...]:
        """The held-out prompts with the answers of before and of the best adapter."""
        if not self.questions:
            return ()
        with self._best_in_place():
            now = self.answers("fine-tuned model")
        pairs = zip(self.questions, before or [], now, strict=True)
        return tuple(AnswerPair(each.prompt, each.reference, tuple(old), tuple(new)) for each, old, new in pairs)

    def baseline(self, place: str) -> Baseline:
        """Loss and answers before the first step: read from `place` if an earlier attempt has measured them."""
        origin, first = self.spec.baseline_identity(), self.context.rank == 0
        found = collectives.from_first(Baseline.read(place, origin, len(self.questions)) if first else None)
        if found is None:
            loss = self.loss(0) if self.spec.eval else None
            start = "adapter that training starts with" if self.spec.config.train.start else "base model"
            found = Baseline(loss, self.answers(start) if self.questions else None)
            if first:
                found.write(place, origin)
        return found
