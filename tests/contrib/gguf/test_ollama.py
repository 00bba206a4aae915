"""The Modelfile for Ollama. Ollama itself is not here: its templates are read by a few lines that know as much Go."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from olora_ray.contrib import ollama
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.exporter import Trained
from tests import tiny
from tests.contrib.gguf.test_gguf import llama
from tests.said import said

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHIN_USER = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ s if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
COUNTS = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}{% endfor %}"
CHATS = [
    [("user", "hello")],
    [("user", "one"), ("assistant", "two"), ("user", "three")],
    [("system", "rules"), ("user", "one"), ("assistant", "two"), ("user", "three")],
]


def as_go_does(template: str, chat: list[tuple[str, str]]) -> str:
    """Execute a template of Ollama that has the one loop over the messages, and comparisons in it."""
    found = re.fullmatch(
        r"\{\{- range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}((?:(?!\{\{).)*)",
        template,
        re.DOTALL,
    )
    assert found
    text = ""
    for number, (role, content) in enumerate(chat):
        shown = [True]
        for part in re.split(r"(\{\{.*?\}\})", found[1]):
            if asked := re.fullmatch(r'\{\{ if eq \$m\.Role "(\w+)" \}\}', part):
                shown.append(shown[-1] and asked[1] == role)
            elif part == "{{ if eq $i 0 }}":
                shown.append(shown[-1] and number == 0)
            elif part == "{{ end }}":
                shown.pop()
            elif shown[-1]:
                text += content if part == "{{ $m.Content }}" else part
        assert shown == [True]
    return text + found[2]


def made(folder: Path, template: str | None, system: str | None = None) -> tuple[str, Any]:
    llama(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    config = tiny.config(model__name=str(folder))
    model = skeleton(BaseModel(str(folder), str(folder), ""), config.model)
    return ollama.modelfile(Trained("mine", model, config, (1, 2), system), tokenizer), tokenizer


@pytest.mark.parametrize(
    "template", [CHATML, WITHIN_USER, NO_SYSTEM], ids=["chatml", "inst", "none"]
)
def test_the_template_renders_chats_as_the_tokenizers_own(tmp_path: Path, template: str) -> None:
    text, tokenizer = made(tmp_path, template, system="Be brief.")
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert go
    for chat in CHATS:
        if template != NO_SYSTEM or chat[0][0] != "system":
            messages = [{"role": role, "content": content} for role, content in chat]
            own = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert as_go_does(go[1], chat) == own
    assert 'SYSTEM """Be brief."""' in text
    assert 'PARAMETER stop "</s>"' in text
    assert 'PARAMETER stop "<|user|>"' in text


def test_a_model_that_calls_tools_is_told_to_be_served_otherwise(tmp_path: Path) -> None:
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    with said() as lines:
        text, _ = made(tmp_path, tools + CHATML)
    assert "\nTEMPLATE" in text  # for chats without tools
    assert "llama-server --jinja" in text
    assert "tools" in lines[-1]
    assert "llama-server" not in made(tmp_path, CHATML)[0]


@pytest.mark.parametrize("template", [COUNTS, None])
def test_no_template_is_better_than_a_wrong_one(tmp_path: Path, template: str | None) -> None:
    text, _ = made(tmp_path, template)
    assert "\nTEMPLATE" not in text
    assert "\nSYSTEM" not in text
