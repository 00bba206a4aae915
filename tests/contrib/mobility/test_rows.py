"""Each person's stays are split by time, draws do not depend on the order of records, and rows suffice for a report."""

import json
from collections.abc import Sequence
from pathlib import Path

import rows
from hypothesis import given
from hypothesis import strategies as st
from prompt import Message, Template
from stays import Records, Stay, When

People = dict[str, list[Stay]]


def people(counts: list[int]) -> People:
    """Return stays of people called 0, 1, ..., whose place equals their number."""
    return {
        str(person): [
            Stay(n, n * 500 + person, When(n % 7, (n * 500) % 1440)) for n in range(count)
        ]
        for person, count in enumerate(counts)
    }


counts = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(counts, st.integers(0, 8))
def test_every_stay_is_a_target_once_or_too_early_and_training_lies_before_the_rest(
    sizes: list[int], least: int
) -> None:
    found = rows.select(people(sizes), least)
    for person, size in enumerate(sizes):
        numbers = [
            [t.number for t in found.targets[name] if t.person == str(person)]
            for name in rows.SPLITS
        ]
        assert sum(numbers, []) == list(range(min(least, size), size))  # noqa: RUF017
        if not least:
            assert abs(len(numbers[0]) - 0.6 * size) < 1
            assert abs(len(numbers[2]) - 0.2 * size) < 1
    assert found.too_early == sum(min(least, size) for size in sizes)
    assert found.not_drawn == {"train": 0, "eval": 0, "test": 0}


def six(messages: Sequence[Message]) -> bool:
    """Return True for at most six stays: each has a colon, and so have the target and the three names."""
    return messages[1]["content"].count(":") <= 10


def test_the_files(tmp_path: Path) -> None:
    known = people([30, 20])
    selection = rows.select(known, 4, {"test": 5})
    template = Template("short", 6, 3)
    records = Records(known, {"cafe, corner": 1})
    said = rows.write(tmp_path, records, selection, template, six)
    assert said[0] == "train: 22 rows of 2 people, 16 without their oldest stays, which did not fit"
    assert (
        said[2]
        == "test: 5 rows of 2 people, 5 more were not drawn, 5 without their oldest stays, which did not fit"
    )
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert (row["user"], row["stay"], row["shown"]) == ("0", 4, 4)
    assert row["messages"][:2] == template.question(known["0"][:4], known["0"][4].when)
    assert row["messages"][2]["content"] == '{"prediction": 4}'
    late = json.loads(lines[13])
    assert late["shown"] == 6 < 9
    assert late["messages"] == template.example(known["0"][:17][-6:], known["0"][17])
    assert rows.read_stays(tmp_path) == known
    assert (tmp_path / "places.csv").read_text() == 'location_id,name\n1,"cafe, corner"\n'
    assert Template.load(tmp_path / "template.json") == template
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == [
        "eval.jsonl",
        "places.csv",
        "stays.csv",
        "template.json",
        "test.jsonl",
        "train.jsonl",
    ]
    rows.write(tmp_path, records, selection, template, six)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_row_with_turns(tmp_path: Path) -> None:
    known = people([30])
    template = Template("short", 6, 3)
    said = rows.write(tmp_path, Records(known, {}), rows.select(known, 4, turns=5), template, None)
    assert said[0] == "train: 3 rows of 1 people, which ask for 14 stays"
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[1])
    assert (row["stay"], row["shown"]) == (9, 9)
    assert row["messages"] == template.example(known["0"][:9], *known["0"][9:14])
