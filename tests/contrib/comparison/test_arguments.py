"""The command line of a comparison, and its section of the config."""

import re
from pathlib import Path

import pytest
import yaml

from comparison.arguments import Compare, parse
from olora_ray.common.errors import UserError
from olora_ray.config.command_line import default
from olora_ray.config.load import load_config


@pytest.fixture
def file(tmp_path: Path) -> str:
    tree = {
        "run": {"name": "task", "storage": str(tmp_path / "runs"), "seed": 17},
        "model": {"name": "some/model"},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        "adapter": {"dropout": 0.1},
        "train": {"early_stop": 3, "global_batch": 4},
        "cluster": {"workers": [1, 2]},
        "registry": {"model": "task"},
    }
    place = tmp_path / "config.yaml"
    place.write_text(yaml.safe_dump(tree))
    return str(place)


def test_a_comparison_has_a_name_of_its_own_and_the_same_rules_for_all(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = parse([file, "train.lr=1e-4", "--methods", "lora, olora", "--seeds=3"], "usage")
    assert [(arm.name, arm.values) for arm in found.arms] == [
        ("lora", {"adapter.method": "lora"}),
        ("olora", {"adapter.method": "olora"}),
    ]
    assert found.seeds == (18, 19, 20)
    config = found.config
    assert (config.run.name, config.run.seed, config.train.lr) == ("task-compare", 17, 1e-4)
    assert (config.adapter.dropout, config.train.early_stop, config.registry.model) == (
        0.0,
        None,
        None,
    )
    assert config.cluster.workers == 1
    assert (found.own.run.name, found.own.adapter.dropout, found.own.registry.model) == (
        "task",
        0.1,
        "task",
    )
    assert (
        "adapter.dropout: 0 in all trainings of a comparison, instead of the config's 0.1"
        in caplog.text
    )
    assert "train.early_stop: null in all trainings" in caplog.text
    assert "registry.model" not in caplog.text
    assert config.run.seed not in found.seeds


def test_an_arm_is_any_override_of_adapter_and_training(file: str) -> None:
    words = [
        "--arm",
        "wide: adapter.rank=64, adapter.targets=[q_proj, v_proj]",
        "--arm=plus: train.lr_ratio=16",
    ]
    found = parse([file, *words], "usage")
    assert [(arm.name, arm.values) for arm in found.arms] == [
        ("wide", {"adapter.rank": 64, "adapter.targets": ["q_proj", "v_proj"]}),
        ("plus", {"train.lr_ratio": 16}),
    ]
    assert found.baseline.name == "wide"
    both = parse([file, *words, "--methods", "olora,lora"], "usage")
    assert [arm.name for arm in both.arms] == ["olora", "lora", "wide", "plus"]
    assert both.baseline.name == "lora"


def test_every_arm_gets_the_same_trainings(file: str) -> None:
    found = parse(
        [
            file,
            "train.lr=1e-3",
            "compare.rates=[0.5,1,2]",
            "--arm",
            "a: train.lr=0.1",
            "--methods",
            "lora",
        ],
        "",
    )
    shown = [
        (trial.name(), trial.values["train.lr"], trial.values["train.lr_factor"])
        for trial in found.tuning()
    ]
    assert shown == [
        ("lora-x0.5-seed17", "auto", 0.5),
        ("lora-x1-seed17", "auto", 1.0),
        ("lora-x2-seed17", "auto", 2.0),
        ("a-x0.5-seed17", 0.1, 0.5),
        ("a-x1-seed17", 0.1, 1.0),
        ("a-x2-seed17", 0.1, 2.0),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["FILE", "FILE"], "expected a config file"),
        (
            ["FILE", "--methods", "lora,pisa"],
            "argument --methods: 'pisa' is no adapter.method; use some of ",
        ),
        (["FILE", "--methods", "lora"], "argument --arm: a comparison needs two arms"),
        (["FILE", "--arm", "rank 8"], "argument --arm 'rank 8': expected 'NAME: field=value"),
        (["FILE", "--arm", "a: adapter.rnk=8"], "argument --arm a: adapter.rnk: unknown field"),
        (
            ["FILE", "--arm", "a: data.max_length=9"],
            "argument --arm a: data.max_length cannot differ between arms",
        ),
        (
            ["FILE", "--methods", "lora", "--arm", "lora: adapter.rank=8"],
            "argument --arm lora: two arms have this name",
        ),
        (["FILE", "--seeds", "1"], "argument --seeds: expected 2 to 100, not '1'"),
        (["FILE", "train.start=/x"], r"train\.start: .*set it to null"),
        (["FILE", "compare.test_rows=1"], r"compare\.test_rows: "),
        (["FILE", "compare.rates=[1,1,2]"], r"compare\.rates: must be increasing"),
        (
            ["FILE", "compare.test_row=9"],
            r"compare\.test_row: unknown field; did you mean compare\.test_rows\?$",
        ),
    ],
)
def test_mistakes_are_one_line(file: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse([file if word == "FILE" else word for word in words], "usage")
    assert "\n" not in str(error.value)


def test_the_file_of_a_run_has_the_section_and_other_commands_leave_it_out(file: str) -> None:
    alone = load_config(file)
    with Path(file).open("a") as added:
        added.write("compare: {test_rows: 64, relevant: 0.02}\n")
    assert load_config(file) == alone
    found = parse([file, "compare.tuning_rows=40"], "usage")
    assert found.compare == Compare(tuning_rows=40, test_rows=64, relevant=0.02)
    assert found.config.model_dump().keys() == alone.model_dump().keys()


def test_help_and_the_page_have_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], "usage")
    helped = " ".join(capsys.readouterr().out.split())
    page = (Path(__file__).parents[3] / "docs" / "evidence.md").read_text(encoding="utf-8")
    for name, field in Compare.model_fields.items():
        described = " ".join((field.description or "").split())
        assert f"{name} {described} (" in helped
        assert re.search(
            rf"^\| `{name}` \| .+ \| `{re.escape(default(field))}` \| {re.escape(described)} \|$",
            page,
            re.M,
        )
