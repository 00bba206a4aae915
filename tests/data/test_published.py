"""Popular data sets in their published schemas: the right text is supervised, or a person is asked."""

import re
from typing import Any

import pytest
import yaml

from olora_ray.common.errors import UserError
from olora_ray.data.formats import to_example
from olora_ray.data.formats.format import Chat, Example, Pair, Rated, Text
from tools import write_datasets

PUBLISHED = yaml.safe_load(write_datasets.ROWS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["set"])
def test_a_popular_set_is_read_right_or_asks(entry: dict[str, Any]) -> None:
    if "answers" in entry:
        assert supervised(entry["row"]) == entry["answers"]
        return
    with pytest.raises(UserError) as caught:
        write_datasets.found(entry["row"])
    line = str(caught.value)
    assert all(column in line for column in entry["asks"])
    proposals = re.findall(r"fields=(\{.*?\})'", line)
    assert {*proposals} - {"{instruction: COLUMN, output: COLUMN}"} == {*entry.get("lines", ())}


def supervised(row: dict[str, Any]) -> list[str]:
    source = write_datasets.found(row).source
    example = to_example(source.format, row, source.fields, as_chat=True, source=source)
    answers: tuple[Example, ...] = (example,)
    if isinstance(example, Pair):
        answers = example
    elif isinstance(example, Rated):
        answers = (example.answer,)
    texts = []
    for answer in answers:
        if isinstance(answer, Chat):
            turns = answer.messages
            texts += [turn["content"] for turn in turns if turn["role"] == "assistant"]
        else:
            assert isinstance(answer, Text)
            texts.append(answer.text)
    return texts


def test_the_page_is_current() -> None:
    current = write_datasets.PAGE.read_text(encoding="utf-8") == write_datasets.page()
    assert current, "docs/generated/datasets.md is stale: make docs"
