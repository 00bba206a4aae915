"""Tokenizer and chat template of a model that somebody else made."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from olora_ray.data.formats import to_example
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.data.tokenizer_spec import TokenizerSpec, spec_from_pretrained
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel
from tests import tiny
from tests.fuzz import mutate
from tests.tokens import helpers

PARTS_IN_LINES = """\
{% for m in messages %}
{% endfor %}
{{ m.content }}
{{ m['role'] }}
{% if add_generation_prompt %}
{% endif %}
{{ messages[0] }}
{{ messages[-1].content | trim }}
{% set x = 1 %}
{{ bos_token }}
{{ eos_token }}
{{
}}
{{ raise_exception('no') }}
{{ 1 / 0 }}
{{ x.y.z }}
{{ tools | tojson }}
{% generation %}
{% endgeneration %}
{{ range(3) | list }}
{{ ''.__class__ }}
{{ messages | length }}
{% include 'x' %}
{% import 'x' as y %}
{#
{{ 10 ** 20 }}
{{ 'a' * 100 }}
{{ 'a' | center(200) }}
{{ strftime_now('%Y') }}
{{ loop.index }}
{{ cycler() }}
"""
PARTS = PARTS_IN_LINES.splitlines()

CHATS = [
    helpers.chat("who are you?", "a model"),
    helpers.chat("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!" * 3, "b" * 40),
]


def cases(seed: int, made: Any) -> Iterator[Any]:
    """Templates of random parts, with other letters, or made to do harm; tokenizers with other values."""
    base = helpers.spec()
    inner = json.loads(base.json)
    for number in range(10**9):
        random = Random(f"tokenizer {seed} {number}")
        match number % 4:
            case 0:
                yield helpers.spec("".join(random.choices(PARTS, k=random.randrange(1, 9))))
            case 1:
                yield helpers.spec(mutate.text(random, helpers.CHATML))
            case 2:
                nasty = random.choice(PARTS)
                yield helpers.spec(random.choice([nasty + helpers.CHATML, helpers.CHATML + nasty]))
            case _:
                changed = mutate.tree(
                    random, {**inner, "model": {**inner["model"], "vocab": _few(inner)}}
                )
                if random.random() < 0.3:
                    pattern = {
                        "Regex": random.choice(
                            ["(a+)+$", "(", "a{1000000}", "(.*)*b", "\\p{L}+", "(?=a)*"]
                        )
                    }
                    changed = {
                        **inner,
                        "pre_tokenizer": {
                            "type": "Split",
                            "pattern": pattern,
                            "behavior": "Isolated",
                            "invert": False,
                        },
                    }
                yield json.dumps(changed)


def _few(inner: dict[str, Any]) -> dict[str, int]:
    return dict(list(inner["model"]["vocab"].items())[:120])


def read(content: Any, place: Path, made: Any) -> None:
    """Tokens of two chats, a completion and a text; a text is that of a tokenizer.json."""
    spec = _loaded(content, place / "model") if isinstance(content, str) else content
    tokenize = ExampleTokenizer(spec, 256)
    for row in CHATS:
        tokenize(to_example("messages", row, {}))
    tokenize(to_example("prompt_completion", {"prompt": "a" * 30 + "!", "completion": "b"}, {}))
    tokenize(to_example("text", {"text": "a" * 300 + "!"}, {}))


def _loaded(content: str, folder: Path) -> TokenizerSpec:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": helpers.CHATML,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    base = BaseModel("here", str(folder), "")
    return spec_from_pretrained(load_tokenizer(base, tiny.config().model), "here")
