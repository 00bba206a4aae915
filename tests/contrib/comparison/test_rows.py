"""The three sets of rows are disjoint, decided by content alone, large enough, and written unchanged."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparison import rows
from comparison.arguments import Compare
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data.detect import read_as
from olora_ray.tokens import prepare
from olora_ray.tokens.plan import looking, make_plan
from tests import tiny

SPEC: Any = SimpleNamespace(digest="tokenizer", packing=lambda setting: True)


@pytest.fixture(autouse=True)
def without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the tokenizer: the rows do not depend on it, and no digest of a plan is needed."""

    def plan(config: Any, spec: Any, split: Any) -> Any:
        scans = prepare.scan
        root = config.run.storage
        look = looking(
            root,
            lambda sources: [[scans(file, root) for file in each] for each in sources],
            read_as,
        )
        return make_plan(config, spec, split, look)

    monkeypatch.setattr(rows, "plan_here", plan)


def row(number: int, user: str | None = None) -> dict[str, str]:
    return {"prompt": f"what is {number}?", "completion": str(number)} | (
        {"user": user} if user else {}
    )


def written(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in found))
    return path


WANTED = Compare(tuning_rows=4, test_rows=6)


def split(config: Config, wanted: Compare = WANTED) -> rows.RowSets:
    found = rows.split(config, wanted, SPEC)
    found.write(config)
    return found


def config(folder: Path, train: Path, held: Path | None = None, **changes: Any) -> Config:
    source = {"format": "prompt_completion"}
    found = tiny.config(
        data__train=[{"path": str(train), **source}],
        data__eval=[{"path": str(held), **source}] if held else [],
    )
    return override(found, {"run.storage": str(folder), **changes})


def lines(found: rows.RowSets, kind: rows.Kind) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for source in found.sources[kind]
        for line in Path(source.path).read_text().splitlines()
    ]


def numbers(found: rows.RowSets, kind: rows.Kind) -> set[str]:
    return {each["completion"] for each in lines(found, kind)}


KINDS: tuple[rows.Kind, ...] = ("train", "tuning", "test")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30), min_size=40, max_size=60), st.integers(0, 2**16))
def test_sets_are_disjoint_and_follow_from_content(
    tmp_path: Path, drawn: list[int], seed: int
) -> None:
    found = [row(number) for number in [*drawn, *range(40, 60)]]  # with rows that are equal
    mixed = random.Random(seed).sample(found, len(found))
    sets = []
    for name, order in (("one", found), ("two", mixed)):
        folder = tmp_path / f"{seed}-{len(drawn)}-{sum(drawn)}-{name}"
        folder.mkdir(exist_ok=True)
        sets.append(split(config(folder, written(folder / "rows.jsonl", order))))
    first, second = sets
    for kind in KINDS:
        assert numbers(first, kind) == numbers(second, kind)
    assert not numbers(first, "train") & numbers(first, "tuning")
    assert not numbers(first, "train") & numbers(first, "test")
    assert not numbers(first, "tuning") & numbers(first, "test")
    assert set().union(*(numbers(first, kind) for kind in KINDS)) == {
        each["completion"] for each in found
    }
    assert (
        (first.counts["tuning"], first.counts["test"]) == (4, 6) == (len(lines(first, "tuning")), 6)
    )


def test_held_out_rows_are_those_of_the_config_and_never_trained_on(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [row(number) for number in range(30)])
    held = written(tmp_path / "held.jsonl", [row(number) for number in range(25, 40)])
    found = split(config(tmp_path, train, held))
    assert numbers(found, "tuning") | numbers(found, "test") <= {
        str(number) for number in range(25, 40)
    }
    assert not (numbers(found, "tuning") | numbers(found, "test")) & numbers(found, "train")
    assert {str(number) for number in range(25)} <= numbers(found, "train")


def test_the_rows_of_a_group_stay_together_and_count_as_one(tmp_path: Path) -> None:
    of_users = [row(number, user=f"user {number % 7}") for number in range(70)]
    given = config(tmp_path, written(tmp_path / "a.jsonl", of_users), **{"gate.group": "user"})
    found = split(given, Compare(tuning_rows=4, test_rows=15))
    users = [{each["user"] for each in lines(found, kind)} for kind in KINDS]
    assert sum(map(len, users)) == 7
    assert found.counts["test"] == 20  # whole groups
    test = lines(found, "test")
    groups = found.groups["test-0.jsonl"]
    assert len({(each["user"], group) for each, group in zip(test, groups, strict=True)}) == len(
        users[2]
    )


@pytest.mark.parametrize(
    ("count", "test", "changes", "message"),
    [
        (
            12,
            20,
            {},
            r"data\.train: its 12 different rows do not suffice for compare\.test_rows = 20 and compare",
        ),
        (
            12,
            6,
            {},
            r"data\.train: 2 rows left to train on beside 4 tuning and 6 test rows, fewer than train\.global_b",
        ),
        (40, 6, {"gate.group": "@file"}, r"data\.train: its 40 different rows do not suffice"),
    ],
)
def test_too_few_rows_are_one_line(
    tmp_path: Path, count: int, test: int, changes: dict[str, Any], message: str
) -> None:
    given = config(
        tmp_path, written(tmp_path / "a.jsonl", [row(number) for number in range(count)]), **changes
    )
    with pytest.raises(UserError, match=message) as error:
        split(given, Compare(tuning_rows=4, test_rows=test))
    assert "\n" not in str(error.value)
    assert not (Path(given.folder()) / "rows").exists()


def test_a_column_that_no_row_has_is_refused_and_rows_without_it_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a typing error would make rows of one customer independent, and put them into all three sets."""
    some = [row(number, f"user {number % 20}" if number < 37 else None) for number in range(40)]
    file = written(tmp_path / "a.jsonl", some)
    with pytest.raises(
        UserError, match=r"gate\.group: no row of data\.train has a column 'usr'; set it to"
    ) as error:
        split(config(tmp_path, file, **{"gate.group": "usr"}))
    assert "\n" not in str(error.value)
    assert "gate.group" not in caplog.text
    split(config(tmp_path, file, **{"gate.group": "user"}))
    assert "gate.group: 3 rows of data.train have no 'user'" in caplog.text


def test_rows_that_cannot_be_read_are_said_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "a.jsonl", [row(number) for number in range(200)])
    file.write_text(file.read_text() + "{broken\n")
    split(config(tmp_path, file))
    assert "data.train: 1 row left out" in caplog.text
    file.write_text(file.read_text() + "{broken\n" * 40)
    with pytest.raises(UserError, match=r"data\.train\.0: 41 of 241 rows cannot be used"):
        split(override(config(tmp_path, file), {"run.name": "other"}))
