"""Chat templates of model families from TRL's package, and the result of training conversations with each.

    right     each answer follows the ids that a server feeds before it, and ends with a token at which the model stops
    refused   the row is rejected, with a remedy

The templates are TRL's copies of the originals (Apache-2.0), read from its package, which is not imported.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers.utils import chat_template_utils

from olora_ray.data.chat_template import TODAY
from olora_ray.data.formats import Chat, Rejected, to_example
from olora_ray.data.tokenize import ExampleTokenizer, Tokens
from olora_ray.data.tokenizer_spec import TokenizerSpec

# Writes a conversation as servers do.
RENDER: Any = chat_template_utils.render_jinja_template
# Suffix of the twins in which TRL has marked the answers.
TRAINING = "_training"
CHATML = ("<|im_end|>",)
# Longest fitting beginning of a name -> the stop tokens in the family's generation_config.json; others stop as ChatML.
STOPS: dict[str, tuple[str, ...]] = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava": ("</s>",),
    "muse": ("<|eot|>",),
    "phi3": ("<|end|>",),
    "smolvlm": ("<end_of_utterance>",),
}
# Beginning of a name -> the tokenizer's end token, if it differs from the first stop.
ENDS = {"glm4": "<|endoftext|>", "phi3": "<|endoftext|>", "gemma": "<eos>", "diffusion_gemma": "<eos>"}
# Special tokens of these families; <think> and <tool_call> are not special.
CONTROL = re.compile(r"<\|[^|<>\s]+\|?>|<｜[^｜]+｜>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|</s>|\[gMASK\]|<sop>")

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
    files = sorted(file for place in places for file in Path(place, "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def stops(name: str) -> tuple[str, ...]:
    """The tokens at which a family's models stop; the first one ends a plain answer."""
    return tuple(_of_family(name, STOPS) or CHATML)


def ids(name: str) -> dict[str, int]:
    return dict(Tokenizer.from_str(spec(name).json).get_vocab())


def _of_family(name: str, table: dict[str, Any]) -> Any:
    fitting = [start for start in table if name.startswith(start)]
    return table[max(fitting, key=len)] if fitting else None


@lru_cache
def spec(name: str) -> TokenizerSpec:
    """A spec with one token per character, and the template's special tokens."""
    end = _of_family(name, ENDS) or stops(name)[0]
    special = sorted({*CONTROL.findall(sources()[name]), *stops(name), end, "<bos>"})
    vocabulary = {token: number for number, token in enumerate(["<unk>", *special, *map(chr, range(9, 256))])}
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
    row = {"messages": CASES[case], "tools": [TOOL] if case.startswith(("tools", "beside")) else None}
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
    return Trained("".join(parts), "".join(mark * len(part) for mark, part in zip(marks, parts, strict=True)))


def prompt(name: str, conversation: Chat, number: int) -> str:
    """The text that a server feeds before message `number`, written by transformers."""
    messages = list(spec(name).chat_form(conversation.tools is not None)(conversation).messages[:number])
    tools = list(conversation.tools) if conversation.tools else None
    rendered, _ = RENDER(
        [messages], tools, None, sources()[name], add_generation_prompt=True, **spec(name).special_tokens
    )
    text = str(rendered[0])
    for form in ("%d %b %Y", "%Y-%m-%d"):  # of templates that say which day it is
        text = text.replace(datetime.now().strftime(form), TODAY.strftime(form))
    return text


def outcome(name: str, case: str) -> str:
    """ "right", "refused: " with the reason, or "wrong: " with the fault."""
    conversation = chat(case)
    try:
        found = train(name, conversation)
    except Rejected as odd:
        return f"refused: {odd.message}"
    answers = [pair for each in found for pair in each.answers()]
    wanted = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if len(answers) != len(wanted):
        return f"wrong: {len(answers)} answers instead of {len(wanted)}: {answers}"
    for number, (before, answer) in zip(wanted, answers, strict=True):
        if before != (fed := prompt(name, conversation, number)):
            return f"wrong: message {number} follows {before[-80:]!r}, not {fed[-80:]!r}"
        ended = [stop for stop in stops(name) for _ in range(answer.count(stop))]
        if len(ended) != 1 or not answer.endswith(ended[0]):
            return f"wrong: the answer does not end where the model stops: {answer!r}"
        message = conversation.messages[number]
        called = ["weather", "city", "Rome"] if "tool_calls" in message else []
        for part in [message["content"].rpartition("</think>")[2].strip(), *called, *[WHY] * _reasons(message)]:
            if part not in answer:
                return f"wrong: {part!r} is not in the answer {answer!r}"
    return "right"


def _reasons(message: dict[str, Any]) -> bool:
    return WHY in str([*message.values()])


def marked_by_twin(name: str, case: str) -> Trained | None:
    """The conversation as TRL's twin writes and marks it; None if there is no twin, or it refuses."""
    if (source := twin(name)) is None:
        return None
    messages = list(spec(name).chat_form(False)(chat(case)).messages)
    rendered, spans = RENDER(
        [messages], None, None, source, return_assistant_tokens_mask=True, **spec(name).special_tokens
    )
    text, mask = str(rendered[0]), [" "] * len(rendered[0])
    for start, end in spans[0]:
        mask[start:end] = "x" * (end - start)
    return Trained(text, "".join(mask))


def table() -> str:
    """The outcomes as Markdown: a row for each template, and below them the messages of the refusals."""
    said: list[str] = []
    lines = [["template", *CASES], ["---"] * (len(CASES) + 1)]
    for name in sources():
        cells = [name]
        for case in CASES:
            found, _, why = outcome(name, case).partition(": ")
            if why:
                why = re.sub(r"message \d+: ", "", why).replace(f" of {name}", "")
                said += [why] if why not in said else []
                found += f" ({said.index(why) + 1})"
            cells.append(found)
        lines.append(cells)
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return rows + "\n\n" + "\n".join(f"{number}. `{_code(why)}`" for number, why in enumerate(said, 1))


def _code(text: str) -> str:
    return text.replace("`", "'")
