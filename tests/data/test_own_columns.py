"""Files as users have them: a column that decides what a row means needs an answer, and the others pass."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from olora_ray.common.errors import UserError
from olora_ray.tokens.preview import describe
from tests import tiny
from tests.data.other_tools import TEMPLATE
from tests.data.own_files import HARMLESS, MATTERS, Case, without, write
from tests.tokens import helpers

ROWS = json.dumps([case.rows for case in MATTERS + HARMLESS], ensure_ascii=False, default=str)


def _json() -> str:
    """The tokenizer with one token per letter, with the letters of all files."""
    tree = json.loads(helpers.spec().json)
    known = tree["model"]["vocab"]
    known.update(
        {
            letter: len(known) + n
            for n, letter in enumerate(sorted({*ROWS, *map(chr, range(33, 127))} - known.keys()))
        }
    )
    return json.dumps(tree)


SPEC = helpers.spec(TEMPLATE, json=_json())
LETTERS = {number: letter for letter, number in json.loads(SPEC.json)["model"]["vocab"].items()}


def dry_run(path: Path, fields: dict[str, str], folder: Path) -> tuple[str, str, list[int]]:
    """Return the error, or the text of all examples and the supervised tokens; without Ray."""
    source = {"path": str(path), "fields": fields}
    config = helpers.config(folder / "runs", source, max_length=8192, max_rejected=0)
    try:
        preview = describe(tiny.read_as(config), SPEC)
    except UserError as error:
        return str(error), "", []
    ids = [int(one) for pack in preview.some_packs for one in pack.input_ids]
    trained = [int(one) for pack in preview.some_packs for one in pack.input_ids[pack.supervised]]
    return "", "".join(LETTERS[one] for one in ids), trained


def outcome(case: Case, folder: Path) -> str:
    error, text, trained = dry_run(write(case, folder), case.fields, folder)
    if error:
        names = [name.rpartition("].")[2] for name in case.columns]
        return "refused: " * any(repr(name) in error or name in error for name in names) + error
    if lost := [part for part in case.read if part not in text]:
        return f"WRONG: {lost[0]!r} is not in the text"
    says = "".join(LETTERS[one] for one in trained)
    bad = [part for part in case.untrained if part in (says if isinstance(part, str) else trained)]
    return f"WRONG: {bad[0]!r} is trained" if bad else "accepted"


@pytest.mark.parametrize("case", MATTERS, ids=lambda case: case.name)
def test_a_column_that_matters_needs_an_answer(case: Case, tmp_path: Path) -> None:
    found = outcome(case, tmp_path)
    assert found.startswith("refused: ") or (
        found == "accepted" and case.expect == "used or refused"
    ), found
    assert "\n" not in found
    if "leave it out with " in found:
        setting = shlex.split(found.partition("leave it out with ")[2])[0]
        fields: dict[str, Any] = yaml.safe_load(setting.removeprefix("data.train.0.fields="))
        assert not dry_run(tmp_path / case.file, fields, tmp_path)[0]


@pytest.mark.parametrize("case", HARMLESS, ids=lambda case: case.name)
def test_other_columns_pass(case: Case, tmp_path: Path) -> None:
    assert outcome(case, tmp_path) == "accepted"


@pytest.mark.parametrize("case", MATTERS + HARMLESS, ids=lambda case: case.name)
def test_without_its_columns_each_file_is_ordinary(case: Case, tmp_path: Path) -> None:
    assert outcome(without(case), tmp_path) == "accepted"


# Twenty more, written after the others passed: names and values between the two kinds.


def asked(**columns: list[Any]) -> list[dict[str, Any]]:
    rows = [{"question": f"Was ist die Lösung {n}?", "answer": f"Es ist {n}."} for n in range(9)]
    return [
        {**row, **{k: each[n % len(each)] for k, each in columns.items()}}
        for n, row in enumerate(rows)
    ]


def said(key: str, values: list[Any], turn: int = 1) -> list[dict[str, Any]]:
    rows = []
    for n, row in enumerate(asked()):
        turns = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        turns[turn][key] = values[n % len(values)]
        rows.append({"messages": turns})
    return rows


DECIDING: dict[str, list[dict[str, Any]]] = {
    "equation": asked(equation=["12*34+56", "78*91-1234"]),
    "numbers": asked(numbers=["3, 5, 8, 12", "9, 7, 1, 22"]),
    "fen": asked(
        fen=["rnbqkbnr/pppppppp/8/8/8/8/PPPP/RNBQ w KQkq - 0 1", "8/8/8/4k3/8/8/4K3/8 b - - 12 60"]
    ),
    "smiles": asked(smiles=["CC(=O)OC1=CC=CC=C1C(=O)O", "C1=CC=C(C=C1)C2=CC=CC=C2"]),
    "developer_prompt": asked(developer_prompt=["Be terse"]),
    "metadata": asked(metadata=[{"system_prompt": "Be a pirate"}, {"system_prompt": "Be a monk"}]),
    "source": asked(source=["Guten Morgen zusammen", "Gute Nacht allerseits"]),
    "tools": said("tools", [[{"name": "f"}], [{"name": "g"}]], turn=0),
    "attachments": said("attachments", [["a.pdf"], ["b.pdf"]], turn=0),
    "icd": [{"text": row["question"], "icd": f"J{n}.{n}"} for n, row in enumerate(asked())],
}
PASSING: dict[str, list[dict[str, Any]]] = {
    "sku": asked(sku=["AB-10007-X", "CD-17926-Y"]),
    "stand": asked(stand=["27.02.2024 08:15", "2024-03-01 09:00:00+01:00"]),
    "Betrag": asked(Betrag=["1.234,50 €", "-17%"]),
    "lastModifiedBy": asked(lastModifiedBy=["anna", "ben"]),
    "token_counts": asked(token_counts=[{"prompt": 3}, {"prompt": 4}]),
    "source_urls": asked(source_urls=[["https://a.example/1"], ["https://b.example/2"]]),
    "kind": asked(kind=["customer service"]),
    "problem": [
        {**row, "problem": row["messages"][0]["content"]} for row in said("id", ["a", "b"])
    ],
    "ip": asked(ip=["10.0.12.7", "192.168.0.44"]),
    "tool name": [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": f"f{n}", "arguments": {}},
                        }
                    ],
                },
                {"role": "tool", "name": f"f{n}", "tool_call_id": "c", "content": "1"},
                {"role": "assistant", "content": "1"},
            ]
        }
        for n in range(9)
    ],
}


@pytest.mark.parametrize("name", [*DECIDING, *PASSING])
def test_further_columns(name: str, tmp_path: Path) -> None:
    path = helpers.write_jsonl(tmp_path / "a.jsonl", DECIDING.get(name) or PASSING[name])
    error = dry_run(path, {}, tmp_path)[0]
    assert (f"{name!r} (such as " in error) is (name in DECIDING), error
    assert bool(error) is (name in DECIDING), error
