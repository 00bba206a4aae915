"""The form of prompt_completion rows, and its influence on the name of a token store."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.data import chat_template, detect
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.prepare import plan_here, prepare
from olora_ray.tokens.preview import describe
from tests.said import said
from tests.tokens import helpers

ROW = {"prompt": "two and two? ", "completion": "four"}
PLAIN = helpers.spec(chat_template.DEFAULT)


def source(chat: Any = "auto", format: str = "prompt_completion", **more: Any) -> dict[str, Any]:
    return {"format": format, "chat": chat, **more}


@pytest.mark.parametrize(
    ("spec", "chat", "text", "line"),
    [
        (
            helpers.spec(),
            "auto",
            "<|im_start|>user\ntwo and two? <|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n",
            "become turns of a chat; tiny gets them in its own chat template",
        ),
        (
            helpers.spec(),
            False,
            "<s>two and two? four</s>",
            "are joined without a chat template, but servers of tiny apply one",
        ),
        (
            PLAIN,
            "auto",
            "<s>two and two? four</s>",
            "are joined without a chat template: tiny has none",
        ),
        (
            PLAIN,
            True,
            "User: two and two? \n\nAssistant: four</s>\n\n",
            "become turns of a chat; tiny gets them in the plain chat template, because it has none",
        ),
    ],
)
def test_the_form_is_said_and_trained(
    spec: TokenizerSpec, chat: Any, text: str, line: str, tmp_path: Path
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [ROW])
    config = helpers.config(tmp_path / "runs", source(chat, path=str(path)))
    expected = f"data.train.0: prompts and completions {line}"
    with said() as lines:
        describe(config, spec)
    assert lines.count(expected) == 1
    with said() as lines:
        store = prepare(config, spec, "train")
    assert lines.count(expected) == 1
    assert helpers.texts(store) == [text]


@pytest.mark.parametrize(
    ("format", "chat", "message"),
    [
        ("text", True, "rows of format text are always plain text"),
        ("alpaca", False, "rows of format alpaca are always chats"),
        ("messages", False, "rows of format messages are always chats"),
        ("tokens", True, "rows of format tokens are used as they are"),
        ("tokens", False, "rows of format tokens are used as they are"),
        ("prompt_completion", "sometimes", "chat"),
    ],
)
def test_a_form_that_a_format_does_not_have_is_refused(
    format: str, chat: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        helpers.config(tmp_path, source(chat, format, path="x.jsonl"))
    assert "data.train.0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "chat", "message"),
    [
        ({"input_ids": [1, 2]}, True, "rows of format tokens are used as they are"),
        ({"input_ids": [1, 2]}, False, "rows of format tokens are used as they are"),
        ({"text": "some text"}, True, "rows of format text are always plain text"),
        (helpers.chat("two and two?", "four"), False, "rows of format messages are always chats"),
    ],
)
def test_a_form_is_refused_for_a_detected_format_too(
    row: dict[str, Any], chat: bool, message: str, tmp_path: Path
) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=rf"^data\.train\.0\.chat: {message}"):
        detect.check_data(helpers.config(tmp_path, source(chat, "auto", path=str(path))))


def inputs(
    tmp_path: Path, chat: Any, format: str, spec: TokenizerSpec, **data: Any
) -> dict[str, Any]:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", [ROW])
    found: Any = plan_here(
        helpers.config(tmp_path, source(chat, format, path=str(path)), **data), spec, "train"
    ).inputs()
    return {**found, **found["sources"][0]}


CALLS = "{% for call in message.tool_calls or [] %}{{ call.function.WRITTEN }}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        (CALLS.replace("WRITTEN", "arguments | tojson"), "arguments", "objects"),
        (CALLS.replace("WRITTEN", "arguments + ''"), "arguments", "text"),
        ("{{ message.thinking }}", "reasoning", "any name"),
        ("{{ message.content }}", "ends", [["", "</s>", "</s>"]] * 2),
        (
            "{% if message.content is none %}" + CALLS.replace("WRITTEN", "name") + "{% endif %}",
            "calls_alone",
            "null",
        ),
    ],
)
def test_a_template_that_writes_calls_in_its_own_way_is_in_the_name_of_a_store(
    written: str, name: str, value: str, tmp_path: Path
) -> None:
    spec = helpers.spec(f"{{% for message in messages %}}{written}{{% endfor %}}")
    for format in ("messages", "sharegpt", "prompt_completion"):
        assert inputs(tmp_path, "auto", format, spec)[name] == value
        assert name not in inputs(tmp_path, "auto", format, helpers.spec())
    assert name not in inputs(tmp_path, False, "prompt_completion", spec)
    assert name not in inputs(tmp_path, "auto", "text", spec)


def test_the_form_is_in_the_name_of_a_store_where_it_changes_tokens(tmp_path: Path) -> None:
    found = [
        inputs(tmp_path, chat, "prompt_completion", helpers.spec())
        for chat in ("auto", True, False)
    ]
    assert found[0] == found[1]
    assert (found[0]["chat"], found[2]["chat"]) == (True, False)
    assert inputs(tmp_path, "auto", "prompt_completion", PLAIN)["chat"] is False
