"""The mobility scripts, from nothing to rows and a table, and their errors."""

import csv
import json
from datetime import datetime
from pathlib import Path

import generate
import mat_data
import prepare
import pytest
import report
from prompt import Template
from stays import numbered

from olora_ray.common.errors import UserError
from olora_ray.config.load import load_config
from olora_ray.data.formats import to_example
from olora_ray.data.tokenize import ExampleTokenizer
from olora_ray.pipeline.base import open_base
from olora_ray.train.scoring import Judge
from tests.contrib.mobility.conftest import MOBILITY
from tests.pipelines import project


@pytest.fixture
def records(tmp_path: Path) -> Path:
    generate.main(
        ["--out", str(tmp_path / "records"), "--people", "8", "--days", "14", "--explore", "0.2"]
    )
    return tmp_path / "records"


def test_from_nothing_to_a_table(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    prepare.main(
        [
            *(str(records / "check_ins.csv"), "--format=checkins", "--out", str(data)),
            *("--rows", "train=30,eval=10,test=40", "--form", "hours"),
            *("--history", "10", "--context", "3", "--least", "6"),
        ]
    )
    said = capsys.readouterr().out
    assert "train: 30 rows of 8 people" in said
    assert "not targets: 48 stays with fewer than 6 before them" in said
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    template = Template.load(data / "template.json")
    assert template == Template("hours", 10, 3)
    with (data / "answers.jsonl").open("w") as out:
        for number, row in enumerate(rows, 1):
            reference = row["messages"][-1]["content"]
            out.write(
                json.dumps({"origin": f"t:{number}", "text": reference, "reference": reference})
                + "\n"
            )
    report.main([str(data), str(data / "answers.jsonl"), "--law", str(records / "law.csv")])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "40 rows of 8 people"
    assert any(line.startswith("model ") and "1.000        1.000" in line for line in table)
    assert sum("full past" in line for line in table) >= 5
    assert any(line.startswith("best possible") for line in table)
    assert any(line.startswith("The model beats the best simple baseline") for line in table)


@pytest.mark.ray
def test_the_answers_of_an_evaluation_lead_to_their_rows(records: Path, tmp_path: Path) -> None:
    model = project.make_model(tmp_path / "model")
    data, command = tmp_path / "data", [str(records / "check_ins.csv"), "--format=checkins"]
    prepare.main(
        [
            *command,
            "--out",
            str(data),
            "--rows",
            "train=2,eval=2,test=9",
            "--form=hours",
            "--history=2",
        ]
    )
    tree = project.settings(tmp_path, model, data__max_length=600, gate={"group": "user"})
    tree["data"]["eval"] = [{"path": str(data / "test.jsonl")}]
    tree["evaluation"] |= {"scorer": "mobility.answer:next_place", "rows": 7}
    file = project.write_config(tmp_path, tree)
    ended = project.run_script("evaluate.py", model, "--config", file, "--out", data)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    answers = [json.loads(line) for line in (data / "answers.jsonl").read_text().splitlines()]
    assert [item["scores"] for item in answers] == [
        {"acc_at_1": 0.0, "valid": 0.0}
    ] * 7  # a random model writes no JSON
    found = report.make_report(data, data / "answers.jsonl")
    assert found.model.places == (report.NOWHERE,) * 7
    answers.sort(key=lambda item: int(item["origin"].rpartition(":")[2]))
    assert found.truth == tuple(json.loads(item["reference"])["prediction"] for item in answers)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--format=gpx", "argument --format: 'gpx' is unknown"),
        ("--history=many", "argument --history: expected a"),
        ("--rows=dev=3", "argument --rows: 'dev' is not a split"),
        ("--rows=train=0", "argument RECORDS: no row for train.jsonl; add"),
        ("--rows=eval=", "argument --rows: expected a whole"),
        ("--turns=0", "argument --turns: a row asks for one"),
        ("--form=long", "argument --form: 'long' is unknown"),
        ("--least=999", "no row for train.jsonl"),
        ("--repair=x", "argument --repair: 'x' is unknown"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    records: Path, tmp_path: Path, option: str, expected: str
) -> None:
    given = [str(records / "check_ins.csv"), "--out", str(tmp_path / "out")]
    format = [] if option.startswith("--format") else ["--format=checkins"]
    with pytest.raises(UserError) as caught:
        prepare.main([*given, *format, option])
    assert expected in str(caught.value)
    with pytest.raises(UserError, match="arguments RECORDS, --format and --out: needed"):
        prepare.main([])
    assert not (tmp_path / "out").exists()


def test_questions_are_cut_to_the_config(records: Path, tmp_path: Path) -> None:
    model = project.make_model(tmp_path / "model")
    config = project.write_config(tmp_path, project.settings(tmp_path, model, data__max_length=520))
    out = tmp_path / "data"
    prepare.main(
        [
            *(
                str(records / "check_ins.csv"),
                "--format",
                "checkins",
                "--out",
                str(out),
                "--config",
                str(config),
            ),
            *("--rows", "train=20,eval=2,test=20"),
        ]
    )
    shown = [json.loads(line)["shown"] for line in (out / "test.jsonl").read_text().splitlines()]
    assert 0 < max(shown) < 45
    tokens = ExampleTokenizer(open_base(load_config(config)).spec, 520)
    for line in (out / "train.jsonl").read_text().splitlines():
        assert tokens(to_example("messages", json.loads(line), {}))  # else Rejected


HEAD = "date_time,time,rating,price,weather,day,type,lat,lon,tid,label\n"
LINE = "{time},1,-1.0,-1,Clear,Monday,Office,{lat},-73.9,{tid},Food\n"


def test_people_are_put_together_from_their_weeks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weeks = [
        (10, "2012-05-07 08:00:00", "40.1"),
        (10, "2012-05-08 09:30:00", "40.2"),
        (11, "2012-05-14 08:00:00", "40.2"),  # later, and shares a venue: the same person
        (12, "2012-05-21 08:00:00", "40.3"),  # shares none
        (13, "2012-05-07 08:00:00", "40.3"),  # earlier
        (14, "2012-06-07 08:00:00", "40.3"),
    ]
    for name, part in (("b", weeks[::2]), ("a", weeks[1::2])):
        lines = [LINE.format(time=time, lat=lat, tid=tid) for tid, time, lat in part]
        (tmp_path / f"{name}.csv").write_text(HEAD + "".join(lines))
    out = tmp_path / "check_ins.csv"
    mat_data.main([str(tmp_path / "b.csv"), str(tmp_path / "a.csv"), "--out", str(out)])
    assert "written: 6 check-ins of 3 people" in capsys.readouterr().out
    with out.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["user_id"] for row in rows] == ["0", "0", "0", "1", "2", "2"]
    places = numbered({f"{row['latitude']} {row['longitude']}" for row in rows})
    assert [places[f"{row['latitude']} {row['longitude']}"] for row in rows] == [
        int(row["location_id"]) for row in rows
    ]
    assert [row["latitude"] for row in rows] == ["40.1", "40.2", "40.2", "40.3", "40.3", "40.3"]
    assert (rows[1]["start_day"], rows[1]["start_min"], rows[1]["weekday"]) == ("1", "570", "1")
    assert datetime(2012, 5, 8).weekday() == 1


@pytest.mark.parametrize("name", ["mobility", "mobility-demo"])
def test_the_configs_score_by_place_and_group_by_person(name: str) -> None:
    config = load_config(MOBILITY / f"{name}.yaml")
    assert config.gate.group == "user"
    assert config.gate.metric == "eval/acc_at_1"
    given = '{"prediction": 12}'
    assert Judge(config.evaluation.scorer or "")(given, given) == {"acc_at_1": 1.0, "valid": 1.0}
