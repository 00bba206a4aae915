"""A row of each format, to tokens."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from olora_ray.data.formats import to_example
from olora_ray.data.tokenize import ExampleTokenizer
from tests.fuzz import mutate
from tests.fuzz.case import Case, WrongResult
from tests.tokens import helpers

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "1"},
    {"role": "assistant", "content": [{"type": "text", "text": "it is 42"}]},
]
ROWS: dict[str, list[Any]] = {
    "messages": [{"messages": TURNS, "tools": TOOLS}, helpers.chat("who?", "me")],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}],
            "tools": "[]",
        }
    ],
    "alpaca": [
        {
            "instruction": "add",
            "input": "1 2",
            "output": "3",
            "system": "be brief",
            "history": [["a", "b"]],
        }
    ],
    "prompt_completion": [{"prompt": "1 + 1 = ", "completion": "2"}],
    "text": [{"text": "once upon a time"}],
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes tools and calls: rows whose parts are left out are rejected before they are tokens."""
TOKENIZER = ExampleTokenizer(helpers.spec(TEMPLATE), 1000)


def cases(seed: int, made: Any) -> Iterator[Case]:
    """Rows with values of other types, or none at all."""
    for number in range(10**9):
        random = Random(f"rows {seed} {number}")
        format = list(ROWS)[number % len(ROWS)]
        row = (
            mutate.value(random)
            if random.random() < 0.05
            else mutate.tree(random, random.choice(ROWS[format]))
        )
        yield Case((format, row))


def read(content: tuple[str, Any], place: Path, made: Any) -> None:
    """Accepted is what has tokens to learn."""
    format, row = content
    for tokens in TOKENIZER(to_example(format, row, {})):
        if (
            not tokens.supervised.any()
            or len(tokens.ids) != len(tokens.supervised)
            or len(tokens.ids) > 1000
        ):
            raise WrongResult(
                f"{len(tokens.ids)} tokens, {int(tokens.supervised.sum())} supervised"
            )
