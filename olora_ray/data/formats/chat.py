"""Roles, content, tool calls and tools of messages: the common part of all formats of chats."""

import ast
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from olora_ray.data.formats.format import Chat, Field, Rejected, Row, listed, type_name

ROLES = {"developer", "system", "user", "assistant", "tool"}
SYSTEMS = ("system", "developer")
SHAREGPT_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""Roles of other tools, in small letters, and their names in our chats."""
CALL = "function_call"
"""Role of a tool call in format sharegpt; the turn's value is JSON text."""
ANSWERS = ("target", "targets", "solution", "chosen", "assistant", "generation")
"""Other names of the column with the answer, after those that differ between formats."""
TURNS = ("chat", "dialogue", "dialog", "turns", "contents")
"""Other names of the column with all turns."""
SYSTEM = Field(
    "system", ("system_prompt", "system_message", "system_instruction", "systeminstruction")
)
# Types of content parts that are text. Images may have a `text` too, and reasoning is not part of an answer.
TEXTS = (None, "text", "input_text", "output_text")
# Keys under which messages hold the reasoning before an answer.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys by which Axolotl, ms-swift and LLaMA-Factory mark whether an answer is supervised.
MARKS = ("train", "training", "loss")


def to_chat(
    turns: list[Any], tools: Any = None, role: str = "role", content: str = "content"
) -> Chat:
    """Return the chat of turns whose keys are `role` and `content`; raise Rejected if they are not a valid chat.

    A model is never asked to begin, so what the assistant says before the first question is context.
    """
    messages = [
        _message(turn, number, role, content, turns) for number, turn in enumerate(turns, 1)
    ]
    roles = [message["role"] for message in messages]
    if all(name in SYSTEMS for name in roles):
        raise Rejected("no_messages", "the chat has no messages")
    first = roles.index("user") if "user" in roles else len(roles)
    if "tool" in roles[:first]:
        raise Rejected("bad_role", "a message from tool needs one from user before it")
    if "assistant" not in roles[first:]:
        raise Rejected(
            "no_answer", f"no assistant message follows one from user; roles: {', '.join(roles)}"
        )
    for number in range(first):
        if roles[number] == "assistant":
            messages[number] = {**messages[number], "weight": 0}
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, "field 'tools' is text, but not JSON")
    else:
        tools = without_nulls(tools)
    if not tools:
        return Chat(tuple(messages))
    return Chat(tuple(messages), tuple(_objects(sequence(tools, "tools"), "field 'tools'")))


def with_roles(row: Row, turns: list[Any], role: str) -> list[Any]:
    """Return the turns with the roles that `roles` of the source names."""
    roles = row.roles
    if not roles:
        return turns
    renamed = []
    for turn in turns:
        if isinstance(turn, Mapping) and isinstance(turn.get(role), str):
            turn = {**turn, role: roles.get(turn[role], turn[role])}
        renamed.append(turn)
    return renamed


def sequence(value: Any, name: str) -> list[Any]:
    """Return a list, or the list in a JSON text (csv and some parquet files); raise Rejected for anything else.

    Also restores a list that `datasets` has stored as a Sequence of objects: {"role": [...], "content": [...]}.
    """
    if isinstance(value, str):
        value = parsed(value, f"field {name!r} is text, not a list of messages")
    value = _turned_back(value)
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"field {name!r} is {type_name(value)}, not a list")
    return value


def in_a_cell(value: Any) -> Any:
    # csv holds messages as text; a value that is no list of messages stays unchanged.
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return _turned_back(value)
    try:
        turns = _loaded(value)
    except (ValueError, RecursionError):
        return value
    if not isinstance(turns, list) or not turns:
        return value
    for turn in turns:
        if not isinstance(turn, dict) or "role" not in turn:
            return value
        if "content" not in turn and "tool_calls" not in turn:
            return value
    return turns


def _turned_back(value: Any) -> Any:
    # {"role": [...], "content": [...]} -> [{"role": ..., "content": ...}, ...]; any other value stays unchanged.
    if not isinstance(value, dict) or not value:
        return value
    parts = list(value.values())
    if not all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]


def _message(
    turn: Any, number: int, role: str, content: str, turns: Sequence[Any]
) -> dict[str, Any]:
    if type(turn) is dict and turn.keys() == {role, content}:
        # Most turns end here, in a quarter of the time.
        name = turn[role]
        text = turn[content]
        if type(name) is type(text) is str and name in ROLES and text.strip():
            return {"role": name, "content": text}
    if not isinstance(turn, Mapping):
        raise Rejected(
            "wrong_type",
            f"message {number} is {type_name(turn)}, not an object with {role!r} and {content!r}",
        )
    if not isinstance(turn.get(role), str):
        problem = f"message {number} has no {role!r}; it has {listed(turn)}"
        if (role, content) == ("role", "content") and "from" in turn:
            problem += "; from and value need format: sharegpt, and no fields"
        raise Rejected("missing_field", problem)
    name = turn[role].strip().lower()
    name = SHAREGPT_ROLES.get(name, name)
    if name not in ROLES:
        known = ", ".join(sorted({*ROLES, *SHAREGPT_ROLES}))
        problem = f"message {number}: unknown role {turn[role]!r}; known: {known}; name it in the roles of the source"
        raise Rejected("bad_role", problem, _unknown_roles(turns, role))
    # Templates want a missing key, not a null.
    rest = {
        key: without_nulls(value)
        for key, value in turn.items()
        if value is not None and key not in (role, content)
    }
    marks = [rest.pop(key) for key in MARKS if rest.get(key) in (False, True)]
    if False in marks and name == "assistant":
        rest["weight"] = 0
    if "function_call" in rest and not turn.get(content):  # OpenAI's form before tool_calls
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    if "tool_calls" in rest:
        calls = rest["tool_calls"]
        what = f"message {number}: 'tool_calls'"
        if isinstance(calls, str):
            calls = parsed(calls.strip() or "[]", f"{what} is text, but not JSON")
        rest["tool_calls"] = [_of_langchain(call) for call in _objects(calls, what)]
        # Servers write [] without calls, but templates only check whether the key exists.
        if not rest["tool_calls"]:
            del rest["tool_calls"]
    text = content_of(turn.get(content), number, content)
    if not text.strip() and not rest.get("tool_calls"):
        if name == "assistant":
            raise Rejected(
                "empty_answer", f"message {number}: {content!r} of the assistant is empty"
            )
        if content not in turn:
            raise Rejected(
                "missing_field", f"message {number} has no {content!r}; it has {listed(turn)}"
            )
    if rest.get("weight", 1) not in (0, 1):
        raise Rejected(
            "wrong_type", f"message {number}: weight must be 0 or 1, not {rest['weight']!r}"
        )
    return {**rest, "role": name, "content": text}


def _of_langchain(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call or "args" not in call:
        return call
    function = {"name": call.get("name"), "arguments": call["args"]}
    return {"type": "function", "id": call.get("id"), "function": function}


def _unknown_roles(turns: Sequence[Any], role: str) -> list[str]:
    names = [turn.get(role) for turn in turns if isinstance(turn, Mapping)]
    texts = [name for name in dict.fromkeys(names) if isinstance(name, str)]
    known = {*ROLES, *SHAREGPT_ROLES, CALL}
    return [name for name in texts if name.strip().lower() not in known]


def content_of(value: Any, number: int, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping) and "parts" in value:  # Gemini's system instruction
        value = value["parts"]
    if isinstance(value, str):
        return value
    what = f"message {number}: {name!r}"
    if not isinstance(value, list) or not all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        raise Rejected("wrong_type", f"{what} is {type_name(value)}, not text")
    for part in value:
        if part.get("type") not in TEXTS:
            raise Rejected(
                "wrong_type", f"{what} has a part of type {part['type']!r}, which is not text"
            )
        if any(part.get(key) == 0 for key in (*MARKS, "weight")):
            raise Rejected("wrong_type", f"{what} has a part that is not to be trained")
    return "".join(part["text"] for part in value)


def _objects(values: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise Rejected("wrong_type", f"{what} is {type_name(values)}, not a list of objects")
    for value in values:
        if not isinstance(value, dict):
            raise Rejected(
                "wrong_type", f"{what} must contain only objects, not {type_name(value)}"
            )
    return values


def without_nulls(value: Any) -> Any:
    """Return the value without the keys, at any depth, whose value is null; null entries of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def parsed(text: str, otherwise: str) -> Any:
    try:
        return _loaded(text)
    except ValueError:
        raise Rejected("wrong_type", otherwise) from None


def _loaded(text: str) -> Any:
    """Return the value of JSON text, or of a list or object as Python prints it; raise ValueError for other text.

    pandas writes lists into csv as Python prints them, and arrays of objects without the commas between these.
    """
    try:
        return json.loads(text)
    except ValueError:
        if not text.lstrip().startswith(("[", "{")):
            raise
    printed: list[tuple[int, str]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.string == "{" and printed[-1:] == [(tokenize.OP, "}")]:
                printed.append((tokenize.OP, ","))
            if token.type != tokenize.NL:
                printed.append((token.type, token.string))
        return ast.literal_eval(tokenize.untokenize(printed))
    except (SyntaxError, tokenize.TokenError, MemoryError, TypeError) as error:
        raise ValueError(str(error)) from None


def after_system(row: Row, turns: list[Any], role: str, content: str) -> list[Any]:
    # Anthropic, Bedrock and Gemini write the system message beside the others, as a text or as parts.
    value = row.optional("system")
    if isinstance(value, list | dict):
        system = content_of(value, 0, "system")
    else:
        system = row.optional_text("system")
    if not system:
        return turns
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if first.get(role) != "system":
        return [{role: "system", content: system}, *turns]
    if content_of(first.get(content), 1, content) != system:
        where = f"field {row.column('system')!r} and the first message"
        raise Rejected("bad_role", f"{where} have different system messages")
    return turns


def question_answer(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
