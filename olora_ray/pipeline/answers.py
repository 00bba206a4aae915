"""The generated answers of a run to held-out prompts, as text and as scores."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from olora_ray.cluster.spec import TrainResult
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.schema import OF_PAIRS, AnyConfig, Config
from olora_ray.tokens.store import TokenStore
from olora_ray.train import scoring
from olora_ray.train.generate import wanted_questions

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""{"before": {name: mean}, "after": {name: mean}}."""
Judged = tuple[list[dict[str, float]], list[dict[str, float]]]
"""The scores of each answer before the training, and of each answer after it."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    before: str
    after: str


def answered(result: TrainResult, tokenizer: Any) -> list[Sample]:
    text = partial(as_text, tokenizer)
    return [
        Sample(
            text(item.prompt, special=True),
            text(item.reference),
            text(item.before),
            text(item.after),
        )
        for item in result.answers
    ]


def judged(config: Config, answers: Sequence[Sample]) -> Judged:
    """Return the scores of each answer, ([], []) without a scorer; raise UserError if the scorer fails."""
    if not config.evaluation.scorer or not answers:
        return [], []
    judge = scoring.Judge(config.evaluation.scorer)
    before = [judge(item.before, item.reference) for item in answers]
    after = [judge(item.after, item.reference) for item in answers]
    judge.tell_partial(after)
    return before, after


def rows_of(answers: Sequence[Sample], when: str) -> list[scoring.Row]:
    """Return the answers "before" or "after" the training as rows for a scorer of all answers."""
    return [
        {"prompt": each.prompt, "reference": each.reference, "answer": getattr(each, when)}
        for each in answers
    ]


def means(config: Config, answers: Sequence[Sample], scored: Judged) -> Scores:
    """Return the mean of each score, and the scores of all answers together; {} without a scorer."""
    if not config.evaluation.scorer or not answers:
        return {}
    judge = scoring.Judge(config.evaluation.scorer)
    found = {}
    for when, scores in zip(("before", "after"), scored, strict=True):
        found[when] = {**scoring.means(scores), **judge.over_all(rows_of(answers, when))}
    return found


def scores_after(config: Config, result: TrainResult, tokenizer: Any) -> dict[str, float]:
    """Return the scores after a training; raise UserError if the scorer fails."""
    samples = answered(result, tokenizer)
    return means(config, samples, judged(config, samples)).get("after", {})


def check_answers(config: AnyConfig, held_out: TokenStore | None, tokenizer: Any) -> frozenset[str]:
    """Score each reference against itself, before any expensive work; return the names of the scores.

    Raises UserError with the first row whose reference the scorer cannot score, or if the gate needs a score that the
    scorer does not return. Warns if no held-out row has a question.
    """
    if config.evaluation.scorer is None or held_out is None:
        return frozenset()
    judge = scoring.Judge(config.evaluation.scorer)
    asked = wanted_questions(config.evaluation, held_out)
    names: set[str] = set()
    why = ""
    if not asked:
        why = "no held-out row has a question and an answer"
        if config.evaluation.rows:
            logger.warning(f"evaluation.scorer: no answers are scored, because {why}")
    most = config.evaluation.max_new_tokens
    lengths = [len(question.reference) - 1 for question in asked]  # without the end token
    longer = [length for length in lengths if length > most]
    if longer:
        logger.warning(
            f"evaluation.max_new_tokens={most}: {len(longer)} of {plural(len(asked), 'reference')} are longer, so"
            f" answers to these rows are cut off and score lower; set it to {max(longer) + 1}"
        )
    references = [as_text(tokenizer, question.reference) for question in asked]
    empty = references.count("")
    if empty:
        logger.warning(
            f"evaluation.scorer: {empty} of {plural(len(asked), 'reference')} consist of special tokens only, which"
            " scoring leaves out, so an empty answer counts as correct; use references in plain text"
        )
    for question, reference in zip(asked, references, strict=True):
        try:
            names |= judge(reference, reference).keys()
        except UserError as error:
            origins = [
                origin for index in range(len(held_out)) for origin in held_out.origins(index)
            ]
            raise UserError(f"{origins[question.row]}: {error}") from error
    best = rows_of([Sample("", each, each, each) for each in references], "after")
    names |= judge.over_all(best).keys()
    if config.evaluation.rows and isinstance(config, Config):
        _check_gate(config, names, why)
    return frozenset(names)


def as_text(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """Return token ids as text for display and scoring; `special` keeps the special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special)).strip()


def _check_gate(config: Config, names: Collection[str], why: str) -> None:
    measured = {
        "auto",
        "eval/loss",
        "eval/perplexity",
        *OF_PAIRS,
        *(f"eval/{name}" for name in names),
    }
    for metric in (config.gate.metric, *(condition.metric for condition in config.gate.conditions)):
        if metric not in measured:
            scores = ", ".join(f"eval/{name}" for name in sorted(names)) or "nothing"
            why = why or f"{config.evaluation.scorer} returns {scores}"
            raise UserError(f"gate: {metric} is not measured: {why}")
