"""The request of an input example says what the held-out question says, or there is none."""

from typing import Any

import pytest

from olora_ray.pipeline import version
from tests.pipelines import project


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(project.make_model(tmp_path_factory.mktemp("model") / "tiny"))


USER = {"role": "user", "content": "after 3?\n(a number)"}
SYSTEM = {"role": "system", "content": "Count."}


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]])
def test_messages_are_found_in_the_text_of_a_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert version.chat(tokenizer, text) == messages


def test_a_longer_conversation_and_a_text_that_is_none_give_no_example(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "4"}
    text = tokenizer.apply_chat_template([USER, answer, USER], add_generation_prompt=True, tokenize=False)
    found = version.chat(tokenizer, text)
    assert found is None or tokenizer.apply_chat_template(found, add_generation_prompt=True, tokenize=False) == text
    assert version.chat(tokenizer, "Once upon a time") is None
