"""Chat templates of model families from TRL's package, and the result of training conversations with each.

    right     each answer follows the ids that a server feeds before it, and ends with a token at which the model stops
    refused   the row is rejected, with a remedy

The templates are TRL's copies of the originals (Apache-2.0), read from its package, which is not imported.
tools/write_models.py writes the results into docs/generated/models.md.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers.utils import chat_template_utils

from olora_ray.data.chat_template import TODAY
from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.tokenize import ExampleTokenizer, Tokens
from olora_ray.data.tokenizer_spec import TokenizerSpec

# Writes a conversation as servers do.
RENDER: Any = chat_template_utils.render_jinja_template
# Suffix of the twins in which TRL has marked the answers.
TRAINING = "_training"
CHATML = ("<|im_end|>",)
# Pattern of a name -> the stop tokens in the family's generation_config.json; the first pattern that fits. Other
# families stop as ChatML does.
STOPS: dict[str, tuple[str, ...]] = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "gemma-?4|diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "glm-?4": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    "gpt-?oss": ("<|return|>", "<|call|>"),
    "idefics|smolvlm": ("<end_of_utterance>",),
    "llama-?3": ("<|eot_id|>", "<|eom_id|>"),
    "llava": ("</s>",),
    "muse": ("<|eot|>",),
    "phi": ("<|end|>",),
}
# Pattern of a name -> the tokenizer's end token, if it differs from the first stop.
ENDS = {"gemma": "<eos>", "glm-?4|phi-?3": "<|endoftext|>"}
# Special tokens of these families; <think> and <tool_call> are not special.
CONTROL = re.compile(
    r"<\|[^|<>\s]+\|?>|<｜[^｜]+｜>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|</s>|\[gMASK\]|<sop>|<SPECIAL_\d+>|<seed:[a-z_]+>"
)

TAG = re.compile(r"</think|</mm:think|\[/THINK|<channel|<\|END_THINKING")
WHOLE_TAG = re.compile(r"</(?:mm:)?think(?::\w+)?>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>")

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Rome"}
JSON = '{"city": "Rome"}'
WHY = "They greet me"
USER = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi there"}
MORE = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still here"}]


def _call(arguments: Any, beside: str = "") -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    found = {"role": "tool", "tool_call_id": "call00000", "name": "weather", "content": "sunny"}
    return [USER, {"role": "assistant", "content": beside, "tool_calls": [call]}, found, HI]


def _thinks(name: str) -> list[dict[str, Any]]:
    return [USER, {**HI, name: WHY}, MORE[0], {**MORE[1], name: WHY}]


# Name -> the messages of a row. Cases with tool calls have tools, except the case of a call alone.
CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, HI],
    "system": [{"role": "system", "content": "Be brief."}, USER, HI],
    "turns": [USER, HI, *MORE],
    "tools": _call(ARGUMENTS),
    "tools as text": _call(JSON),
    "beside a call": _call(ARGUMENTS, "I look it up."),
    "call alone": _call(JSON)[:2],
    "reasoning_content": _thinks("reasoning_content"),
    "thinking": _thinks("thinking"),
    "reasoning": _thinks("reasoning"),
    "in content": [USER, {**HI, "content": f"<think>\n{WHY}\n</think>\n\nHi there"}],
}
CALLS = _call(ARGUMENTS)
SYSTEM = {"role": "system", "content": "Be brief."}
# More cases, which are not on the page.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "tools, system": [SYSTEM, *CALLS],
    "tools, more turns": [*CALLS, *MORE],
    "tools, after a turn": [USER, HI, {**CALLS[0], "content": "And now?"}, *CALLS[1:]],
    "tools, two rounds": [*CALLS[:3], _call({"city": "Oslo"})[1], *CALLS[2:]],
    "tools, thinking": [
        USER,
        {**CALLS[1], "reasoning_content": WHY},
        CALLS[2],
        {**HI, "reasoning_content": WHY},
    ],
    "tools, unused": [USER, HI],
    "thinks once": [USER, {**HI, "reasoning_content": WHY}, *MORE],
    "thinks at last": [USER, HI, MORE[0], {**MORE[1], "reasoning_content": WHY}],
    "developer": [{**SYSTEM, "role": "developer"}, USER, HI],
    "greeting": [{**HI, "content": "Good day"}, USER, HI],
    "greeting, system": [SYSTEM, {**HI, "content": "Good day"}, USER, HI],
    "later system": [USER, HI, SYSTEM, *MORE],
    "later developer": [USER, HI, {**SYSTEM, "role": "developer"}, *MORE],
    "lines": [USER, {**HI, "content": "Hi!\n\n```\n  x = '<b>'\n```\n\nSo long."}, *MORE],
}


def sources() -> dict[str, str]:
    """Name -> Jinja source of the originals; empty without TRL's package."""
    return {name: source for name, source in _sources().items() if not name.endswith(TRAINING)}


def twin(name: str) -> str | None:
    """The template in which TRL has marked the answers, if there is one."""
    return _sources().get(name + TRAINING)


@lru_cache
def _sources() -> dict[str, str]:
    found = importlib.util.find_spec("trl")
    places = (found.submodule_search_locations if found else None) or []
    files = sorted(
        file for place in places for file in Path(place, "chat_templates").glob("*.jinja")
    )
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def stops(name: str) -> tuple[str, ...]:
    """The tokens at which a family's models stop; the first one ends a plain answer."""
    return tuple(_of_family(name, STOPS) or CHATML)


def ids(name: str) -> dict[str, int]:
    return dict(Tokenizer.from_str(spec(name).json).get_vocab())


def _of_family(name: str, table: dict[str, Any]) -> Any:
    return next((table[family] for family in table if re.search(family, name, re.IGNORECASE)), None)


@cache
def spec(name: str) -> TokenizerSpec:
    """A spec with one token per character, and the template's special tokens."""
    end = _of_family(name, ENDS) or stops(name)[0]
    special = sorted({*CONTROL.findall(sources()[name]), *stops(name), end, "<bos>"})
    letters = sorted({*map(chr, range(9, 256)), *sources()[name]})
    vocabulary = {token: number for number, token in enumerate(["<unk>", *special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return TokenizerSpec(
        json=tokenizer.to_str(),
        chat_template=sources()[name],
        special_tokens={"bos_token": "<bos>", "eos_token": end},
        eos_id=vocabulary[end],
        bos_id=vocabulary["<bos>"],
        ends=(vocabulary[end], *(vocabulary[stop] for stop in stops(name))),
        name=name,
    )


@dataclass(frozen=True)
class Trained:
    """An example: its text, and for each character whether it is supervised."""

    text: str
    # x: supervised.
    mask: str

    def answers(self) -> Iterator[tuple[str, str]]:
        """Each answer, after the text that precedes it."""
        for found in re.finditer("x+", self.mask):
            yield self.text[: found.start()], self.text[found.start() : found.end()]


def chat(case: str) -> Chat:
    row = {
        "messages": (CASES | OTHERS)[case],
        "tools": [TOOL] if case.startswith(("tools", "beside")) else None,
    }
    found = to_example("messages", row, {})
    assert isinstance(found, Chat)
    return found


def train(name: str, conversation: Chat) -> list[Trained]:
    """The training text of a conversation; raise Rejected."""
    return [_trained(name, tokens) for tokens in ExampleTokenizer(spec(name), 10**6)(conversation)]


def _trained(name: str, tokens: Tokens) -> Trained:
    tokenizer = Tokenizer.from_str(spec(name).json)
    parts = [str(tokenizer.id_to_token(int(number))) for number in tokens.ids]
    assert "<unk>" not in parts
    marks = np.where(tokens.supervised, "x", " ")
    return Trained(
        "".join(parts), "".join(mark * len(part) for mark, part in zip(marks, parts, strict=True))
    )


def prompt(name: str, conversation: Chat, number: int) -> str:
    """The text that a server feeds before message `number`, written by transformers."""
    formed = spec(name).chat_form(conversation.tools is not None)(conversation)
    return _served(name, formed.messages[:number], conversation.tools)


def _served(name: str, messages: Sequence[dict[str, Any]], tools: Any, ask: bool = True) -> str:
    with patch.object(chat_template_utils, "datetime", Today):
        rendered, _ = RENDER(
            [list(messages)],
            list(tools) if tools else None,
            None,
            sources()[name],
            add_generation_prompt=ask,
            **spec(name).special_tokens,
        )
    return str(rendered[0])


class Today(datetime):
    """The day that templates get here."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TODAY


def outcome(name: str, case: str) -> str:
    """ "right", "refused: " with the reason, or "wrong: " with the fault."""
    conversation = chat(case)
    try:
        found = train(name, conversation)
    except Rejected as odd:
        return f"refused: {odd.message}"
    answers = [pair for each in found for pair in each.answers()]
    wanted = [
        number
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    if len(answers) != len(wanted):
        return f"wrong: {len(answers)} answers instead of {len(wanted)}: {answers}"
    for number, (before, answer) in zip(wanted, answers, strict=True):
        if before != (fed := prompt(name, conversation, number)):
            return f"wrong: message {number} follows {before[-80:]!r}, not {fed[-80:]!r}"
        ended = [stop for stop in stops(name) for _ in range(answer.count(stop))]
        if len(ended) != 1 or not answer.endswith(ended[0]):
            return f"wrong: the answer does not end where the model stops: {answer!r}"
        formed = spec(name).chat_form(conversation.tools is not None)(conversation).messages
        if lost := _lost(name, conversation.tools, formed, number, before + answer):
            return f"wrong: {lost} of the template does not precede the content of {before[-60:] + answer!r}"
        parts = _said(conversation.messages[number])
        after = answer[max(answer.rfind(part) + len(part) for part in parts) :]
        if begun := _begins(name) & {*CONTROL.findall(after)}:
            return f"wrong: {begun} of the next turn is trained: {answer!r}"
        called = [part for part in parts if part in ("Rome", "Oslo")]
        if any(answer.count(part) != called.count(part) for part in ("Rome", "Oslo")):
            return f"wrong: the answer calls another number of times: {answer!r}"
        if len(TAG.findall(answer)) != len(WHOLE_TAG.findall(answer)):
            return f"wrong: a tag is broken: {answer!r}"
        for part in parts:
            if part not in answer:
                return f"wrong: {part!r} is not in the answer {answer!r}"
    return "right"


@cache
def _begins(name: str) -> set[str]:
    """Special tokens that begin a question after an answer has ended, and do not end one."""
    messages = spec(name).chat_form(False)(Chat((USER, HI, MORE[0]))).messages
    try:
        text = _served(name, messages, None)
    except Exception:  # some templates need tools
        text = _served(name, messages, [TOOL])
    tokens = CONTROL.findall(text.partition("Hi there")[2].partition("And now?")[0])
    ended = [number for number, token in enumerate(tokens) if token in stops(name)]
    return set(tokens[ended[0] + 1 :]) - {*tokens[: ended[0]], *stops(name)} if ended else set()


def _lost(
    name: str, tools: Any, messages: Sequence[dict[str, Any]], number: int, ours: str
) -> set[str]:
    """Special tokens between the question and the answer in transformers' rendering that our text does not have."""
    asked, said = (str(messages[each]["content"] or "") for each in (number - 1, number))
    said = said.rpartition("</think>")[2].strip()
    if not asked or not said:
        return set()
    theirs = _served(name, messages[: number + 1], tools, ask=False)
    wanted, own = (
        {*CONTROL.findall(text.rpartition(said)[0].rpartition(asked)[2])} for text in (theirs, ours)
    )
    return wanted - own


def _said(message: dict[str, Any]) -> list[str]:
    """What the text of an answer must contain."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    places = ["Rome" if "Rome" in str(call["arguments"]) else "Oslo" for call in calls]
    why = [WHY] * (WHY in str([*message.values()]))
    return [
        *why,
        message["content"].rpartition("</think>")[2].strip(),
        *["weather", "city"] * bool(calls),
        *places,
    ]


def marked_by_twin(name: str, case: str) -> Trained | None:
    """The conversation as TRL's twin writes and marks it; None if there is no twin, or it refuses."""
    if (source := twin(name)) is None:
        return None
    messages = list(spec(name).chat_form(False)(chat(case)).messages)
    rendered, spans = RENDER(
        [messages],
        None,
        None,
        source,
        return_assistant_tokens_mask=True,
        **spec(name).special_tokens,
    )
    text, mask = str(rendered[0]), [" "] * len(rendered[0])
    for start, end in spans[0]:
        mask[start:end] = "x" * (end - start)
    return Trained(text, "".join(mask))


def table() -> str:
    """The outcomes as Markdown: a row per group of templates with the same ones, then the messages of the refusals."""
    said: list[str] = []
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in sources():
        cells = []
        for case in CASES:
            found, _, why = outcome(name, case).partition(": ")
            if why:
                why = re.sub(r"message \d+: ", "", why).replace(f" of {name}", "")
                said += [why] if why not in said else []
                found += f" ({said.index(why) + 1})"
            cells.append(found)
        rows.setdefault(tuple(cells), []).append(name)
    lines = [("templates", *CASES), ("---",) * (len(CASES) + 1)]
    lines += [(", ".join(names), *cells) for cells, names in rows.items()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        table
        + "\n\n"
        + "\n".join(f"{number}. `{_code(why)}`" for number, why in enumerate(said, 1))
    )


def _code(text: str) -> str:
    return text.replace("`", "'")
