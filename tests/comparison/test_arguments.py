"""The command line of a comparison, and its section of the config."""

import re
from pathlib import Path

import pytest
import yaml

from comparison.arguments import Compare, parse
from olora_ray.common.errors import UserError
from olora_ray.config.command_line import default
from olora_ray.config.load import load


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
    found = parse([file, "train.lr=1e-4", "--methods", "lora, olora", "--seeds=3", "--budget", "1h30m"], "usage")
    assert (found.methods, found.seeds, found.budget) == (("lora", "olora"), (18, 19, 20), 5400.0)
    config = found.config
    assert (config.run.name, config.run.seed, config.train.lr) == ("task-compare", 17, 1e-4)
    assert (config.adapter.dropout, config.train.early_stop, config.registry.model) == (0.0, None, None)
    assert config.cluster.workers == 1
    assert "adapter.dropout: 0 in all trainings of a comparison, instead of the config's 0.1" in caplog.text
    assert "train.early_stop: null in all trainings" in caplog.text
    assert "registry.model" not in caplog.text
    assert config.run.seed not in found.seeds


def test_a_comparison_without_a_name_has_one_of_its_settings(file: str) -> None:
    names = [parse([file, "run.name=auto", word], "usage").config.run.name for word in ("run.seed=17", "train.lr=0.5")]
    assert all(re.fullmatch("olora-r16-[0-9a-f]{8}-compare", name) for name in names)
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"arguments \(none\): expected a config file"),
        (["FILE", "FILE"], "expected a config file"),
        (["FILE", "--methods", "lora,pisa"], "argument --methods: 'pisa' is no adapter.method; use some of "),
        (["FILE", "--methods", "olora"], "argument --methods: lora is missing"),
        (["FILE", "--methods", "lora"], "argument --methods: name at least one besides lora"),
        (["FILE", "--seeds", "1"], "argument --seeds: expected 2 to 100, not '1'"),
        (["FILE", "--seeds", "four"], "argument --seeds: expected 2 to 100"),
        (["FILE", "--budget", "soon"], "argument --budget: expected a time such as 3h, 90m or 1h30m, not 'soon'"),
        (["FILE", "--budget", "0h"], "argument --budget: expected a time"),
        (["FILE", "train.start=/x"], r"train\.start: .*set it to null"),
        (["FILE", "compare.test_rows=1"], r"compare\.test_rows: "),
        (["FILE", "compare.test_row=9"], r"compare\.test_row: unknown field; did you mean compare\.test_rows\?$"),
        (["FILE", "compare=9"], r"argument 'compare=9': expected section\.field=value"),
    ],
)
def test_mistakes_are_one_line(file: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse([file if word == "FILE" else word for word in words], "usage")
    assert "\n" not in str(error.value)


def test_the_file_of_a_run_has_the_section_and_other_commands_leave_it_out(file: str) -> None:
    alone = load(file)
    with Path(file).open("a") as added:
        added.write("compare: {test_rows: 64, untuned: false}\n")
    assert load(file) == alone
    found = parse([file, "compare.tuning_rows=40"], "usage")
    assert found.compare == Compare(tuning_rows=40, test_rows=64, untuned=False)
    assert found.config.model_dump().keys() == alone.model_dump().keys()


def test_help_and_the_page_have_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], "usage")
    helped = " ".join(capsys.readouterr().out.split())
    page = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text(encoding="utf-8")
    for name, field in Compare.model_fields.items():
        described = " ".join((field.description or "").split())
        assert f"{name} {described} (" in helped
        assert re.search(
            rf"^\| `{name}` \| .+ \| `{re.escape(default(field))}` \| {re.escape(described)} \|$", page, re.M
        )
