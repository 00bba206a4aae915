"""A held-out prompt is asked as a server asks it: in the form, and with the tokens, that were trained."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.data.tokenize import spec_from_pretrained
from olora_ray.tokens.prepare import prepare
from olora_ray.train.generate import questions
from tests.data import small_tokenizers
from tests.tokens import helpers

ROWS = [
    {"prompt": "Sentiment: ", "completion": "positive"},
    {"prompt": "two blanks  ", "completion": "  hello"},
    {"prompt": "Answer:\n", "completion": "\n42"},
    {"prompt": "e", "completion": "\u0301te\u0301 😀"},
]


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-trimmed", "byte-level-nfc", "metaspace-always", "prepend"])
@pytest.mark.parametrize("chat", [True, False])
def test_questions_are_what_a_server_makes_of_the_prompt(kind: str, chat: bool, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.tokenizer(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = helpers.CHATML
    path = helpers.write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = {"path": str(path), "format": "prompt_completion", "chat": chat}
    config = helpers.config(tmp_path / "runs", source, eval=[source], max_length=200)
    asked = questions(prepare(config, spec_from_pretrained(tokenizer, kind), "eval"), 10)
    if chat:
        turns = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
        wanted = [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    else:
        wanted = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
        # An example whose prompt is one token looks like plain text: it is not asked.
        wanted = [ids for ids in wanted if len(ids) > 1]
    assert sorted(question.prompt for question in asked) == sorted(map(tuple, wanted))
    assert all(tokenizer.decode(question.reference, skip_special_tokens=True) for question in asked)
