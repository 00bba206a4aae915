"""Answers of a run to held-out prompts, as text and as scores."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from olora_ray.cluster.spec import TrainResult
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.tokens.store import TokenStore
from olora_ray.train import scoring
from olora_ray.train.generate import wanted_questions

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""{"before": {name: mean}, "after": {name: mean}}."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with its answers, as text."""

    prompt: str
    reference: str
    before: str
    after: str


def answered(result: TrainResult, tokenizer: Any) -> list[Sample]:
    """The answers of a run as text."""

    text = partial(as_text, tokenizer)
    return [
        Sample(text(item.prompt, special=True), text(item.reference), text(item.before), text(item.after))
        for item in result.answers
    ]


def score(config: Config, answers: Sequence[Sample]) -> Scores:
    """Mean scores over the held-out answers before and after training; empty without a scorer.

    Raises UserError for a scorer that fails.
    """
    if not config.evaluation.scorer or not answers:
        return {}
    judge = scoring.Judge(config.evaluation.scorer)
    before = [judge(item.before, item.reference) for item in answers]
    after = [judge(item.after, item.reference) for item in answers]
    for line in scoring.partial_scores(after):
        logger.info(line)
    return {"before": scoring.means(before), "after": scoring.means(after)}


def check(config: AnyConfig, held_out: TokenStore | None, tokenizer: Any) -> frozenset[str]:
    """Have the scorer score each reference that it will see, before anything expensive; returns the scores' names.

    Raises UserError that names the first row with a reference that it cannot score, and for a gate that asks for what
    is not scored. Without questions there is a warning; that no rows are held out is said by the plan.
    """
    if config.evaluation.scorer is None or held_out is None:
        return frozenset()
    judge = scoring.Judge(config.evaluation.scorer)
    asked = wanted_questions(config.evaluation, held_out)
    names: set[str] = set()
    why = "" if asked else "no held-out row has a question and an answer"
    if why and config.evaluation.rows:
        logger.warning(f"evaluation.scorer: nothing is scored: {why}")
    most = config.evaluation.max_new_tokens
    lengths = [len(question.reference) - 1 for question in asked]  # without the end token
    if longer := [length for length in lengths if length > most]:
        logger.warning(
            f"evaluation.max_new_tokens={most}: {len(longer)} of {plural(len(asked), 'reference')} that are scored have"
            f" more tokens, so answers are cut off before they can be like these; set it to {max(longer) + 1} for all"
            " of them"
        )
    references = [as_text(tokenizer, question.reference) for question in asked]
    if empty := references.count(""):
        logger.warning(
            f"evaluation.scorer: {empty} of {plural(len(asked), 'reference')} are empty without their special tokens,"
            " which are left out of all that is scored, so that no answer at all counts as right; use answers in plain"
            " text"
        )
    for question, reference in zip(asked, references, strict=True):
        try:
            names |= judge(reference, reference).keys()
        except UserError as error:
            raise UserError(f"{_place(held_out, question.row)}: {error}") from error
    if config.evaluation.rows and isinstance(config, Config):
        _check_gate(config, names, why)
    return frozenset(names)


def as_text(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """Token ids as the text that is shown and scored; `special`: with the special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special)).strip()


def _check_gate(config: Config, names: Collection[str], why: str) -> None:
    """Raise UserError if the gate asks for a score that the scorer does not even give for its own references.

    `why` nothing is scored, if that is so.
    """
    for metric in (config.gate.metric, *(condition.metric for condition in config.gate.conditions)):
        if metric not in ("eval/loss", "eval/perplexity") and metric.removeprefix("eval/") not in names:
            given = ", ".join(f"eval/{name}" for name in sorted(names)) or "nothing"
            raise UserError(f"gate: {metric} is not measured: {why or f'{config.evaluation.scorer} gives {given}'}")


def _place(store: TokenStore, row: int) -> str:
    """The file and line that a row of the store comes from."""
    for index in range(len(store)):
        found = store.origins(index)
        if row < len(found):
            return found[row]
        row -= len(found)
    raise IndexError(row)
