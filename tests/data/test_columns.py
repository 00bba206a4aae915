"""Columns as users have them: the names and values that need an answer, and those that are about the row.

tests/tokens/test_columns.py shows what a run does about them.
"""

from typing import Any

import pytest

from olora_ray.data.columns import severity

ASKED = "the answer must be short"
NEEDED: dict[str, Any] = {
    # images, videos, sounds
    "images": ["a.png"],
    "audios": ["s3://calls/1.wav"],
    "Bild-URL": "https://cdn.example.de/tap.jpg",
    "screenshot_base64": "iVBORw0KGgo89504e",
    "pixel_values": [[[0.5, 0.1]]],
    # system prompts
    "system_message": ASKED,
    "persona": ASKED,
    "Systemprompt": ASKED,
    "system": [{"text": ASKED}],
    "metadata": {"system_prompt": "pirate"},
    # what the answer is taken from
    "context": ASKED,
    "evidence": [ASKED, ASKED],
    "retrieved_chunks": [{"text": "packed", "rank": 1}],
    "背景资料": "三个工作日内会收到新发票。",
    "db_schema": "CREATE TABLE staff (id INT)",
    "table": {"header": ["item"], "rows": [["order"]]},
    "equation": "12*34+56",
    "numbers": "3, 5, 8, 12",
    "fen": "8/8/8/4k3/8/8/4K3/8 b - - 12 60",
    "smiles": "CC(=O)OC1=CC=CC=C1C(=O)O",
    "source": ASKED,
    # classes, and second answers
    "category": "weather",
    "class": 2,
    "sentiment": "negative",
    "topics": ["weather", "news"],
    "entities": [{"start": 0, "label": "place"}],
    "icd": "J1.1",
    "rejected_response": "no",
    "winner": "a",
    "Antwort 2": "Nein, niemals.",
    # tools and choices
    "functions": [{"name": "f"}],
    "A": "vitamin C",
    "options": {"A": "vitamin A"},
    "target_language": "French",
    "kto_tag": True,
    "train_detail": [{"begin_offset": 0, "train": False}],
}
ABOUT: dict[str, Any] = {
    "id": "a1",
    "uuid": "2f1a-0b",
    "Unnamed: 0": 3,
    "": 3,
    "__index_level_0__": 17,
    "source": "faq",
    "dataset": "oasst",
    "url": "https://help.example.com/articles/7",
    "source_urls": ["https://a.example/1"],
    "created_at": "2024-02-27T08:15:00Z",
    "Erfasst am": "27.02.2024 08:15",
    "Ticketnummer": "TN-10007",
    "Aktenzeichen": "7 C 10007/23",
    "sku": "AB-10007-X",
    "Dateiname": "scan_10007.pdf",
    "lang": "de",
    "split": "train",
    "license": "cc-by-4.0",
    "author": "a.kowalski",
    "lastModifiedBy": "anna",
    "Bearbeiter": "li.wei",
    "来源": "微信",
    "model": "gpt-4o",
    "temperature": 0.7,
    "n_tokens": 48,
    "verified": True,
    "Geprüft": "WAHR",
    "notes": None,
    "embedding": [0.25, 0.5],
    "sha256": "8c7dd922ad47494fc02c388e12c00eac",
    "Betrag": "1.234,50 €",
    "token_counts": {"prompt": 3},
    "meta": {"pile_set_name": "Pile-CC"},
    "Message-ID": "<8c7dd922@mail.example.com>",
    "author_email": "anna@example.org",
    "ip": "10.0.12.7",
    "file_path": "s3://commoncrawl/crawl-data/10007.warc.gz",
    "olora_ray": {"champion": "chats@7", "answer": ASKED},
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_column_that_matters_needs_an_answer(name: str) -> None:
    assert severity("alpaca", name, NEEDED[name])


@pytest.mark.parametrize("name", ABOUT)
def test_other_columns_pass(name: str) -> None:
    assert not severity("alpaca", name, ABOUT[name])


def test_what_may_be_the_same_in_all_rows_depends_on_words_and_name() -> None:
    assert severity("alpaca", "persona", "a pirate") == 1
    assert severity("alpaca", "persona", "You are a pirate") == 2
    assert severity("alpaca", "context", "a pirate") == 2
    assert severity("alpaca", "label", 1) == 2


def test_a_title_is_a_part_of_a_question_only() -> None:
    assert severity("alpaca", "title", ASKED)
    assert not severity("text", "title", ASKED)
