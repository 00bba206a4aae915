"""What is odd about the rows of a split: counted shard by shard, and said once."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from olora_ray.data.example import Chat, Example, Text
from olora_ray.data.form import form_line
from olora_ray.data.tokenize import ExampleTokenizer, Tokens
from olora_ray.tokens.plan import Plan

CHATS, SPLIT, SPLIT_TOKENS, WHOLE_TOKENS = "chats", "split", "split_tokens", "whole_tokens"
SINGLE, UNENDED = "single", "unended"


def count(notes: "Counter[str]", example: Example, found: Sequence[Tokens], tokenize: ExampleTokenizer) -> None:
    """Add an example and its tokens to the notes of its shard."""
    if isinstance(example, Text):
        return
    if isinstance(example, Chat):
        notes[CHATS] += 1
        if len(found) > 1:
            notes[SPLIT] += 1
            notes[SPLIT_TOKENS] += sum(len(each.ids) for each in found)
            notes[WHOLE_TOKENS] += max(len(each.ids) for each in found)
    if min(int(np.count_nonzero(each.supervised)) for each in found) == 1:
        notes[SINGLE] += 1
    if not all(tokenize.ends(each) for each in found):
        notes[UNENDED] += 1


def lines(notes: Mapping[str, int]) -> list[str]:
    """The notes of a split, a line each."""
    found = []
    if split := notes.get(SPLIT, 0):
        times = notes[SPLIT_TOKENS] / notes[WHOLE_TOKENS]
        found.append(
            f"{split:,} of {notes[CHATS]:,} chats were split by the chat template, one example an answer, into"
            f" {times:.1f} times the tokens; with data.last_turn_only: true only the last answer of a chat is trained"
        )
    if single := notes.get(SINGLE, 0):
        found.append(f"rows with a single supervised token: {single:,}")
    if unended := notes.get(UNENDED, 0):
        found.append(
            f"rows whose answer does not end with an end token: {unended:,} (the chat template writes none), so the"
            " model does not learn where to stop"
        )
    return found


def form_lines(plan: Plan) -> list[str]:
    """The form of each source that has a choice, a line each; once for rows of which some are held out."""
    if plan.split == "eval" and plan.eval_fraction is not None:
        return []
    setting = f"data.{plan.split}"
    found = (form_line(source, plan.spec, f"{setting}.{n}") for n, source in enumerate(plan.sources))
    return [line for line in found if line]


def in_both(train: Mapping[str, str], held_out: Mapping[str, str]) -> str | None:
    """What to say where the held-out files, by content, are files of the training data too; None if they are not."""
    found = [held_out[content] for content in held_out if content in train]
    if not found:
        return None
    more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
    return (
        f"data.eval: {found[0]}{more} is trained on too, so the held-out loss, the best step and the gate look better"
        " than they are; leave it out of data.train (a folder and a glob take all that is there)"
    )
