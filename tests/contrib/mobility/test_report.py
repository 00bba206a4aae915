"""A model beside the simple baselines: the same rows, people resampled as a whole, the best possible by the law."""

import json
import sys
from pathlib import Path

import answer
import numpy as np
import pytest
import report
import rows
from prompt import Template
from report import Asked, Best, Predictor, Report, make_report
from stays import Records, Stay, When

from olora_ray.common.errors import UserError


def write(folder: Path, people: int = 6) -> None:
    """Write people who are at 1 and 2 in turn, at noon, except the last 8 stays: always at 3, at midnight."""
    known = {
        str(person): [
            Stay(3 if n >= 32 else 1 + n % 2, n * 1440, When(n % 5, 0 if n >= 32 else 720))
            for n in range(40)
        ]
        for person in range(people)
    }
    rows.write(folder, Records(known, {}), rows.select(known, 5), Template("short", 2, 2), None)


def answers(folder: Path, *texts: str, skip: int = 0) -> Path:
    """Write answers to the rows of test.jsonl after the first `skip`; the last text answers all remaining rows."""
    lines = (folder / "test.jsonl").read_text().splitlines()
    given = []
    for number, line in enumerate(lines[skip:], skip + 1):
        reference = json.loads(line)["messages"][-1]["content"]
        text = texts[min(number - skip, len(texts)) - 1]
        given.append(
            {"model": "m", "row": number, "origin": f"x/test.jsonl:{number}", "text": text}
        )
        given[-1] |= {"reference": reference, "scores": {}}
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in reversed(given)))
    return file


def test_the_model_and_each_baseline_on_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path)
    found = make_report(tmp_path, answers(tmp_path, "nowhere", answer.write(3)))
    assert found.truth == (3,) * 48
    assert found.model.places == (report.NOWHERE, *[3] * 47)
    assert found.accuracy(found.model.places) == pytest.approx(47 / 48)
    by_name = {(each.name, each.sees): found.accuracy(each.places) for each in found.baselines}
    # Of the 8 rows of a person the first sees no 3; the last place is one from the second on.
    assert by_name["last", "full past"] == by_name["last", "stays shown"] == 7 / 8
    assert by_name["most frequent", "stays shown"] == 6 / 8  # of 4 stays 2, the later of equals
    assert by_name["most frequent", "full past"] == 0
    assert by_name["time kernel", "full past"] == 7 / 8
    assert by_name[report.MOVING, "full past"] == 0
    assert {each.name for each in found.baselines if not each.simple} == {report.MOVING}


def test_a_model_that_repeats_a_digit_names_no_place(tmp_path: Path) -> None:
    """The weighted F1 of a number that no array holds once ended the report with a traceback."""
    write(tmp_path)
    found = make_report(
        tmp_path, answers(tmp_path, f'{{"prediction": {"1" * 40}}}', answer.write(3))
    )
    assert found.model.places == (report.NOWHERE, *[3] * 47)
    assert found.lines()[4].split()[:3] == ["model", "stays", "shown"]


def test_the_best_possible_comes_from_the_law(tmp_path: Path) -> None:
    write(tmp_path, people=1)
    law = tmp_path / "law.csv"
    law.write_text(
        "user_id,stay,best,chance\n"
        + "".join(f"0,{n},{3 if n % 2 else 9},0.5\n" for n in range(40))
    )
    found = make_report(tmp_path, answers(tmp_path, answer.write(3)), law)
    assert found.best == Best((9, 3) * 4, (0.5,) * 8)
    assert found.lines()[-1] == (
        "The best possible Acc@1 is 0.500 on average and 0.500 on these rows; the model's is 1.000."
    )
    for cut in ("", "0,1", "x" * 200_000):
        law.write_text(f"user_id,stay,best,chance\n{cut}")
        with pytest.raises(UserError, match=r"law\.csv: not written by generate\.py"):
            make_report(tmp_path, answers(tmp_path, answer.write(3)), law)


def refused(folder: Path, text: str) -> str:
    (folder / "answers.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        make_report(folder, folder / "answers.jsonl")
    return str(caught.value)


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    text = answers(tmp_path, answer.write(3)).read_text()
    found = refused(
        tmp_path,
        text.replace('"reference": "{\\"prediction\\": 3', '"reference": "{\\"prediction\\": 4'),
    )
    assert f"{tmp_path}/test.jsonl:1: the answers are to other rows: evaluate on this file" in found
    assert (
        "answers.jsonl:49: x/test.jsonl:48 was answered before; use the answers of one"
        in refused(tmp_path, 2 * text)
    )
    last = text.splitlines()[0].replace("jsonl:48", "jsonl:99")
    assert "test.jsonl: the answers are for 49 rows, and it has only 48 of them" in refused(
        tmp_path, text + last
    )
    assert "answers.jsonl: no answers; evaluate with a scorer" in refused(tmp_path, "")
    assert "answers.jsonl:48: " in refused(tmp_path, text[:-20])
    assert "answers.jsonl:1: not a line of answers.jsonl" in refused(tmp_path, '{"origin": 3}\n')
    with pytest.raises(UserError, match=r"none\.jsonl: .*No such file"):
        make_report(tmp_path, tmp_path / "none.jsonl")


def made(right: list[list[bool]], simple: list[list[bool]], other: list[list[bool]]) -> Report:
    """Return a report in which place 1 is right, with a list of answers for each person."""
    asked = [Asked(str(person), n, 4) for person, own in enumerate(right) for n in range(len(own))]

    def predictor(name: str, found: list[list[bool]], simple: bool) -> Predictor:
        return Predictor(
            name, "full past", tuple(int(each) for own in found for each in own), simple
        )

    model = predictor("model", right, False)
    return Report(
        asked,
        (1,) * len(asked),
        model,
        [predictor("last", simple, True), predictor("x", other, False)],
        None,
    )


def test_people_are_drawn_not_rows() -> None:
    # 10 people of 100 rows each, the model right on all rows of 7 of them, the baseline of 3: by rows that is sure.
    people = [[person < 7] * 100 for person in range(10)]
    theirs = [[person >= 7] * 100 for person in range(10)]
    found = made(people, theirs, people)
    interval = found.over(found.baselines[0])
    assert interval.mean == pytest.approx(0.4)
    assert interval.low < 0 < interval.high
    assert found.verdict()[0].startswith(
        "These rows do not show that the model beats the best simple baseline (last on"
    )


def test_one_person_says_nothing_of_others(tmp_path: Path) -> None:
    """The interval over one person has no width, so the verdict once was that the model wins, or loses."""
    for ours, theirs in ((True, False), (False, True)):
        found = made([[ours] * 50], [[theirs] * 50], [[theirs] * 50])
        assert found.verdict()[0] == (
            "These rows do not show that the model beats the best simple baseline (last on full past): Acc@1"
            f" {1 if ours else -1:+.3f}, but all rows are of one person."
        )
    write(tmp_path, people=1)
    lines = make_report(tmp_path, answers(tmp_path, answer.write(3))).lines()
    assert lines[0] == "8 rows of one person"
    assert all(line.endswith("one person: none") for line in lines[5:15])


def test_the_verdict_says_who_wins() -> None:
    rng = np.random.default_rng(0)
    good, poor = ([(rng.random(10) < share).tolist() for _ in range(60)] for share in (0.8, 0.4))
    assert (
        made(good, poor, good)
        .verdict()[0]
        .startswith("The model beats the best simple baseline (last on full past)")
    )
    assert (
        made(poor, good, good)
        .verdict()[0]
        .startswith("The model loses to the best simple baseline")
    )
    assert (
        made(good, poor, good)
        .verdict()[1]
        .startswith("These rows do not show that the model beats the best of the other rules (x")
    )


def test_weighted_f1_by_hand() -> None:
    found = Report(
        [Asked("a", n, 1) for n in range(4)],
        (1, 1, 1, 2),
        Predictor("m", "", (1, 1, 2, -1)),
        [],
        None,
    )
    # 1: precision 1, recall 2/3, F1 0.8, three rows; 2: nothing right, one row.
    assert found.weighted_f1(found.model.places) == pytest.approx(0.6)


def test_without_scikit_learn_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    found = make_report(tmp_path, answers(tmp_path, "nowhere"))
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"olora-ray\[mobility\]"):
        found.weighted_f1(found.truth)
