from pathlib import Path
from typing import Any

import jinja2
import pytest

from olora_ray.common.errors import UserError
from olora_ray.data.chat_template import DEFAULT, ChatTemplate
from tests.tokens import helpers

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = message.content.split('</think>')[0] if '</think>' in message.content else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>' + thought + '</think>\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
GENERATION = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ 'A: ' + message.content + eos_token }}
        {% endgeneration %}
        {% continue %}
    {% endif %}
{{ 'Q: ' + message.content }}
{% endfor %}
"""
ALL = {
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "generation": GENERATION,
    "default": DEFAULT,
    "tools": "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}" + helpers.CHATML,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "größe", "description": "<b>bold</b>", "parameters": {}},
    }
]


def conversation(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    start = [{"role": "system", "content": system}] if system else []
    return start + [
        {"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)
    ]


@pytest.fixture(scope="session")
def transformers_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = Path(tmp_path_factory.mktemp("tokenizer"), "tokenizer.json")
    path.write_text(helpers.spec().json)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(
    name: str, generation_prompt: bool, tools: Any, transformers_tokenizer: Any
) -> None:
    for system in (None, "Be <brief> & süß.\n"):
        messages = conversation(
            " Hi \n", "<think>hm</think>\nHello & 'welcome'", "2 < 3?", "yes ", system=system
        )
        for count in range(1 + bool(system), len(messages) + 1):
            expected = transformers_tokenizer.apply_chat_template(
                messages[:count],
                chat_template=ALL[name],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                tools=tools,
            )
            rendered = ChatTemplate(ALL[name], SPECIAL).render(
                messages[:count], generation_prompt, tools
            )
            assert rendered == expected


def test_a_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate("{{ messages.__class__.__mro__ }}", SPECIAL).render([])
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate("{{ messages.append(1) }}", SPECIAL).render([])


def test_dates_stand_still() -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", SPECIAL).render([]) == "26 Jul 2024"


def test_a_broken_template_names_the_model() -> None:
    with pytest.raises(
        UserError, match=r"^model\.name: the chat template of org/model is not valid: .*endfor"
    ):
        helpers.spec("{% for x in messages %}", name="org/model").compiled(tools=False)
