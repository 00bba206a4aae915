"""Columns as users have them, beside a complete row: those that decide stop the first look, the others are left out.

tests/tokens/test_columns.py shows what a run does about them.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from olora_ray.common.errors import UserError
from olora_ray.config.section import Source
from olora_ray.data import detect
from tests.refused import refused

LONG = "The parcel left the warehouse on Monday and was handed to the carrier, " * 3
QUESTION = {"question": "Where is my parcel now?", "answer": "It is with the carrier."}
TEXT = {"text": LONG}
CHAT = {
    "messages": [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "Here."},
    ]
}


def looked_at(folder: Path, row: dict[str, Any], **columns: Any) -> detect.Found:
    """Twelve rows with these columns, whose texts differ between rows, as the first look finds them."""
    file = folder / "rows.jsonl"
    lines = []
    for number in range(12):
        values = {
            name: f"{value} {number}" if isinstance(value, str) and len(value) > 20 else value
            for name, value in columns.items()
        }
        lines.append(json.dumps({**row, **values}))
    file.write_text("\n".join(lines))
    return detect.find_format(Source(path=str(file)), "data.train.0", str(folder))


STOPS: list[tuple[dict[str, Any], str, Any]] = [
    (QUESTION, "images", ["a.png"]),
    (QUESTION, "audios", ["s3://calls/1.wav"]),
    (QUESTION, "Bild-URL", "https://cdn.example.de/tap.jpg"),
    (QUESTION, "screenshot_base64", "iVBORw0KGgo89504e"),
    (QUESTION, "retrieved_chunks", [LONG, LONG]),
    (QUESTION, "evidence", LONG),
    (QUESTION, "label", 3),
    (QUESTION, "kto_tag", "bad"),
    (QUESTION, "rejected", True),
    (QUESTION, "response", "It is at the customs office."),
    (QUESTION, "options", ["here", "there"]),
    (QUESTION, "B", "at the customs office"),
    (QUESTION, "table", {"header": ["place"], "rows": [LONG]}),
    (QUESTION, "loss_mask", [0, 1]),
    (CHAT, "rejected", True),
    (CHAT, "weight", 0.5),
    (TEXT, "sentiment", "negative"),
    (TEXT, "label", 3),
    (TEXT, "category", "weather"),
    (TEXT, "sql", "SELECT place FROM parcels"),
    (TEXT, "prompt", "Write"),
]
LEFT_OUT: list[tuple[dict[str, Any], str, Any]] = [
    (QUESTION, "category", "weather"),
    (QUESTION, "Kategorie", "Versand"),
    (QUESTION, "tags", ["late", "shipping"]),
    (QUESTION, "status", "open"),
    (QUESTION, "customer", "ACME GmbH"),
    (QUESTION, "phone", "+49 89 1234567"),
    (QUESTION, "embedding", [0.25, 0.5]),
    (QUESTION, "metadata", json.dumps({"pages": [LONG, LONG]})),
    (QUESTION, "token_counts", {"prompt": 3}),
    (QUESTION, "image_id", 7),
    (QUESTION, "olora_ray", {"champion": "chats@7", "answer": LONG}),
    (CHAT, "solution", LONG),
    (CHAT, "category", "weather"),
    (TEXT, "title", "A parcel on its way"),
    (TEXT, "url", "https://help.example.com/articles/7"),
    (TEXT, "meta", {"pile_set_name": "Pile-CC"}),
]


@pytest.mark.parametrize(("row", "name", "value"), STOPS)
def test_a_column_that_decides_stops_with_a_question_that_names_the_columns(
    row: dict[str, Any], name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        looked_at(tmp_path, row, **{name: value})
    line = str(caught.value)
    assert line.startswith("data.train.0: ")
    assert all(column in line for column in (*row, name))
    assert "answer" in line or row is CHAT
    assert "\n" not in line


@pytest.mark.parametrize(("row", "name", "value"), LEFT_OUT)
def test_other_columns_are_left_out_and_named(
    row: dict[str, Any], name: str, value: Any, tmp_path: Path
) -> None:
    found = looked_at(tmp_path, row, **{name: value})
    assert found.source.fields[name] == "none"
    assert [*found.left_out] == [name]
    assert f"left out: {name}" in found.words


@pytest.mark.parametrize(
    "columns",
    [
        {"instruction": "Where is it?"},
        {"text": f"### {QUESTION['question']} ### {QUESTION['answer']}"},
    ],
)
def test_a_column_that_repeats_what_is_read_decides_nothing(
    columns: dict[str, str], tmp_path: Path
) -> None:
    row = CHAT if "instruction" in columns else QUESTION
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({**row, **columns})}\n" * 12)
    found = detect.find_format(Source(path=str(file)), "data.train.0", str(tmp_path))
    assert [*found.left_out] == [*columns]


def test_a_long_text_may_be_what_the_answer_rests_on_and_both_lines_are_right(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as caught:
        looked_at(tmp_path, QUESTION, ticket=LONG)
    line = str(caught.value)
    asked = "instruction: question, output: answer"
    assert f"'data.train.0.fields={{{asked}, input: ticket}}'" in line
    assert f"'data.train.0.fields={{{asked}, ticket: none}}'" in line


def test_the_lines_about_a_long_text_are_right_for_a_prompt_and_its_completion(
    tmp_path: Path,
) -> None:
    row = {"prompt": "Where is it?", "response": "Here."}
    with pytest.raises(UserError) as caught:
        looked_at(tmp_path, row, ticket=LONG)
    proposed = re.findall(r"fields=({.*?})'", str(caught.value))
    read = []
    for line in proposed:
        given = Source(path=str(tmp_path / "rows.jsonl"), fields=yaml.safe_load(line))
        found = detect.find_format(given, "data.train.0", str(tmp_path)).source
        read.append("ticket" in found.fields.values())
    assert read == [True, False]


def test_no_column_is_proposed_by_its_place(tmp_path: Path) -> None:
    row = {"ticket_id": 7, "subject": "late parcel", "description": LONG, "agent_reply": LONG}
    with refused("which column is the answer?") as caught:
        looked_at(tmp_path, row)
    line = str(caught.value)
    assert "ticket_id (number" in line
    assert "subject (2 words" in line
    assert "{instruction: COLUMN, output: COLUMN}" in line
