import json
from dataclasses import replace

from tests.sweep.odd import ODD, search
from tests.sweep.searches import realistic


def numbers(record: object) -> list[int]:
    return [trial.number for trial in record]  # type: ignore[attr-defined]


def test_the_best_comes_first_by_the_mode() -> None:
    rows = [({"a": 1}, 2.0), ({"a": 2}, 1.0), ({"a": 3}, None), ({"a": 4}, 2.0)]
    assert numbers(search(rows).ranked()) == [1, 0, 3]
    assert numbers(search(rows, mode="max").ranked()) == [0, 3, 1]
    assert numbers(search(rows).ordered()) == [1, 0, 3, 2]


def test_nan_and_infinity_are_no_values() -> None:
    record = ODD["NaN and infinity"]
    assert numbers(record.ranked()) == [1, 3, 4]
    assert numbers(replace(record, mode="max").ranked()) == [4, 3, 1]


def test_json_has_every_trial_in_order_and_no_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for record in ODD.values():
        content = json.loads(record.to_json(), parse_constant=refuse)
        assert [trial["number"] for trial in content["trials"]] == numbers(record.ordered())
    read = json.loads(realistic().to_json())
    assert read["trials"][0]["params"] == realistic().trials[read["trials"][0]["number"]].params
