"""A part of a chat that a template would drop is written in another form, or its row is rejected."""

from typing import Any

import pytest

from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.tokenize import ExampleTokenizer
from tests.data.test_chat_template import ALL, conversation
from tests.tokens import helpers

TURNS = conversation("hi", "hello")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def only(*roles: str) -> str:
    """ChatML for messages of these roles only, like Qwen's templates, which skip others."""
    begin, end = "{% for message in messages %}", "{% endfor %}"
    inside = helpers.CHATML.split(begin)[1].split(end)[0]
    return helpers.CHATML.replace(
        inside, f"{{% if message['role'] in {list(roles)} %}}{inside}{{% endif %}}"
    )


KNOWN = only("system", "user", "assistant")


def text(template: str, *heads: tuple[str, str], tools: Any = None, **changes: Any) -> str:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in heads]
    [tokens] = ExampleTokenizer(helpers.spec(template, **changes), 1000)(
        Chat((*messages, *TURNS), tools)
    )
    return helpers.decode(tokens.ids)


@pytest.mark.parametrize(
    ("template", "heads", "role", "written"),
    [
        (KNOWN, [("developer", "short")], "system", "short"),
        (KNOWN, [("system", "short")], "system", "short"),
        (helpers.CHATML, [("developer", "short")], "developer", "short"),
        # All templates write the first system message, but some write no second one.
        (
            KNOWN,
            [("system", "short"), ("developer", "in English")],
            "system",
            "short\n\nin English",
        ),
    ],
)
def test_a_developer_whom_the_template_does_not_know_is_the_system(
    template: str, heads: list[tuple[str, str]], role: str, written: str
) -> None:
    expected = f"<|im_start|>{role}\n{written}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert text(template, *heads).startswith(expected)


def test_a_developer_whom_no_role_writes_is_rejected() -> None:
    silent = only("user", "assistant")
    with pytest.raises(
        Rejected, match="of tiny writes neither developer nor system messages: move"
    ) as caught:
        text(silent, ("developer", "short"))
    assert caught.value.reason == "template"
    assert text(silent).startswith("<|im_start|>user\nhi")


@pytest.mark.parametrize(
    "template", [helpers.CHATML, ALL["default"], "{% set tools = none %}" + helpers.CHATML]
)
def test_tools_that_the_template_leaves_out_reject_the_row(template: str) -> None:
    with pytest.raises(Rejected) as caught:
        text(template, tools=(TOOL,))
    assert caught.value.reason == "template"
    assert text(template).count("hello") == 1


NESTED = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"


@pytest.mark.parametrize(
    "written",
    [
        NESTED,
        "{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}",
        "{{ tools | tojson }}",
        f"{{% if messages[0].role == 'system' %}}{NESTED}{{% endif %}}",
        f"{{% if messages[-1].role == 'user' %}}{NESTED}{{% endif %}}",
    ],
)
def test_tools_that_a_template_writes_somewhere_are_not_left_out(written: str) -> None:
    assert helpers.spec(written + helpers.CHATML).chat_form(tools=True).writes_tools


def test_tools_are_looked_for_in_the_template_for_tools() -> None:
    found = text(helpers.CHATML, tools=(TOOL,), tool_template=NESTED + helpers.CHATML)
    assert found.startswith("weather<|im_start|>")
