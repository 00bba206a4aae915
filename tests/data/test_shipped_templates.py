"""The chat templates of the package, by the name that data.chat_template has."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from olora_ray.config.schema import TEMPLATES
from olora_ray.data import tokenizer_spec
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.tokenize import ExampleTokenizer
from tests.tokens import helpers

SHIPPED = Path(tokenizer_spec.__file__).with_name("templates")
ENDS = {"gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}
MARKS = ["<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", *ENDS.values()]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Ulm"}}}


def told(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def written(name: str, *messages: dict[str, Any], tools: Any = None) -> tuple[str, list[str]]:
    """Return the text of a chat in a template, and its supervised parts."""
    source = (SHIPPED / f"{name}.jinja").read_text()
    tokenizer = Tokenizer.from_str(helpers.spec().json)
    tokenizer.add_special_tokens(MARKS)
    spec = helpers.spec(source, json=tokenizer.to_str())
    [tokens] = ExampleTokenizer(spec, 4000)(Chat(messages, tools))
    letters = [tokenizer.id_to_token(int(token)) for token in tokens.ids]
    marked = "".join(
        letter if trained else "\0"
        for letter, trained in zip(letters, tokens.supervised, strict=True)
    )
    return "".join(letters), [part for part in marked.split("\0") if part]


def test_each_name_is_a_file_of_the_package() -> None:
    assert {file.stem for file in SHIPPED.glob("*.jinja")} == {*TEMPLATES} - {"plain"}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_the_answers_of_a_chat_are_supervised_with_their_ends(name: str) -> None:
    chat = [told("system", "Be brief."), told("user", "Where?"), told("assistant", "Here.")]
    text, answers = written(name, *chat, told("user", "When?"), told("assistant", "Now."))
    end = ENDS.get(name, "<|im_end|>")
    assert answers == [f"Here.{end}", f"Now.{end}"]
    assert text.index("Be brief.") < text.index("Where?") < text.index("Here.")


def test_tools_their_calls_and_results_are_written() -> None:
    chat = [
        told("system", "Be brief."),
        told("user", "Rain in Ulm?"),
        told("assistant", "", tool_calls=(CALL,)),
        told("tool", "no"),
        told("assistant", "No."),
    ]
    text, answers = written("chatml-tools", *chat, tools=(TOOL,))
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>'
    assert answers == [f"{call}<|im_end|>", "No.<|im_end|>"]
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert "<tool_response>\nno\n</tool_response>" in text
    with pytest.raises(Rejected):
        written("chatml", *chat, tools=(TOOL,))
