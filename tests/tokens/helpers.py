"""Small corpora, and a tokenizer with one token per character."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import build
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens.store import TokenStore
from tests import tiny

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def spec(chat_template: str = CHATML, **changes: Any) -> TokenizerSpec:
    """A spec with one token per character; `<s>` begins and `</s>` ends."""
    letters = [chr(code) for code in range(9, 256)]
    vocabulary = {token: number for number, token in enumerate(SPECIAL + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    settings = {
        "json": tokenizer.to_str(),
        "chat_template": chat_template,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "eos_id": 2,
        "bos_id": 1,
        "add_bos": True,
        "name": "tiny",
    }
    return TokenizerSpec(**{**settings, **changes})


def decode(ids: Iterable[int]) -> str:
    """The text of ids, special tokens included."""
    tokenizer = Tokenizer.from_str(spec().json)
    return "".join(str(tokenizer.id_to_token(int(token))) for token in ids)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def rows(count: int) -> list[Any]:
    """Chats of different lengths."""
    return [chat(f"q{n}" * (n % 5), f"a{n}" * (1 + n % 7)) for n in range(count)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(storage: Path, *train: Any, **data: Any) -> DecidedConfig:
    """A config whose sources are paths or mappings; other settings of `data` by name."""
    sources = [source if isinstance(source, dict) else {"path": str(source)} for source in train]
    run = {"name": "test", "storage": str(storage), "seed": data.pop("seed", 17)}
    asked = build(
        {
            "run": run,
            "model": {"name": "tiny"},
            "data": {"train": sources, "max_length": 128, **data},
        }
    )
    return tiny.decided(asked)


def texts(store: TokenStore) -> list[str]:
    """The text of every example, in the order of the store."""
    found = []
    for index in range(len(store)):
        pack = store[index]
        start = 0
        for length in pack.segments:
            found.append(decode(pack.input_ids[start : start + length]))
            start += length
    return found


def content(uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(uri).iterdir())}
