"""A config for rows that nobody has described."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.load import load, parse_yaml
from olora_ray.config.schema import Config
from olora_ray.pipeline.dry_run import dry_run
from pipelines import init
from tests.pipelines import project
from tests.tools.test_configuration_page import mistakes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(file: str, numbers: Sequence[int]) -> str:
    chats = ([{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in numbers)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def written(*words: str, out: str = "my_run.yaml") -> Config:
    init.main([*words])
    return load(out)


def test_the_config_is_one_that_an_editor_and_a_run_take(capsys: pytest.CaptureFixture[str]) -> None:
    found = written(rows("chats.jsonl", range(200)), "org/model")
    assert (found.run.name, found.model.name, found.registry.model) == ("chats", "org/model", "chats")
    assert [each.path for each in found.data.train] == ["chats.jsonl"]
    assert (found.data.eval, found.data.eval_fraction) == ((), 0.1)
    assert found.train.global_batch >= found.train.micro_batch * found.cluster.max_workers()
    printed = capsys.readouterr().out
    assert printed.startswith(
        "chats.jsonl: about 200 messages rows in jsonl\nheld out: eval_fraction: 0.1  # about 20 rows\n"
    )
    assert re.findall(r"^  olora-ray (.*?)(?:  #.*)?$", printed, re.MULTILINE) == [
        "finetune my_run.yaml --dry-run",
        "finetune my_run.yaml",
        "chat chats",
    ]
    text = Path("my_run.yaml").read_text(encoding="utf-8")
    assert "too_long: drop_turns  # rows with more tokens than max_length lose their last turns" in text
    assert mistakes("config", parse_yaml(text, "my_run.yaml")) == []
    assert Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")).is_file()
    assert sorted(each.name for each in Path().iterdir()) == ["chats.jsonl", "my_run.yaml"]


@pytest.mark.lengthy
@pytest.mark.parametrize("count", [1, 60, 7000, 30_000])
def test_more_rows_are_used_less_often_and_a_smaller_share_is_held_out(count: int) -> None:
    found = written(rows("a.jsonl", range(count)))
    assert found.data.eval_fraction
    assert count * found.data.eval_fraction <= 1000
    assert found.train.epochs == (1 if count > 5000 else 3)


@pytest.mark.parametrize(
    ("files", "data", "held_out"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "train.jsonl", "validation.jsonl"),
        (["d/train-00000-of-00001.jsonl", "d/test-00000-of-00001.jsonl"], "d", "d"),
        (["d/train.jsonl", "d/test.jsonl"], "d/train.jsonl", "d/test.jsonl"),
        (["d/train-0.jsonl", "d/train-1.jsonl"], "d", None),
        (["chats.jsonl", "test.jsonl"], "chats.jsonl", None),
    ],
)
def test_rows_that_are_held_out_by_name_are_held_out(files: list[str], data: str, held_out: str | None) -> None:
    for number, file in enumerate(files):
        rows(file, range(100 * number, 100 * number + 30))
    found = written(data)
    assert [each.path for each in found.data.eval] == ([held_out] if held_out else [])
    assert (found.data.eval_fraction is None) == (held_out is not None)


@pytest.mark.lengthy
def test_rows_that_stand_there_twice_do_not_stop_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(project.make_model(folder / "model"))
    data = rows("chats.jsonl", [*range(200), *range(150)])
    found = written(data, model)
    assert (
        "\n150 of them are copies or cannot be used; my_run.rows.jsonl has the other rows\n" in capsys.readouterr().out
    )
    assert [each.path for each in found.data.train] == ["my_run.rows.jsonl"]
    assert Path("my_run.rows.jsonl").read_text() == Path(rows("once.jsonl", range(200))).read_text()
    dry_run(command_line.resolved(found, folder))
    with pytest.raises(UserError, match="held-out rows are training rows too"):
        dry_run(command_line.resolved(load("my_run.yaml", {"data.train.0.path": data}), folder))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my chats (1).v2.jsonl", "my-chats-1"),
        ("tokens.jsonl", "tokens-run"),
        ("5 'äé\": #.jsonl", "5"),
        ("support/*.jsonl", "support"),
        ("yes.jsonl", "yes"),
    ],
)
def test_any_path_is_written_as_it_is_and_gives_a_name(data: str, name: str) -> None:
    rows(data.replace("*", "a"), range(30))
    found = written(data, "1e3", "--out", "x.yaml", out="x.yaml")
    assert (found.data.train[0].path, found.run.name, found.model.name) == (data, name, "1e3")


def test_fields_of_the_data_are_taken_and_no_others() -> None:
    Path("a.jsonl").write_text(json.dumps({"ask": "1?", "say": "2"}) + "\n")
    words = ("data.train.0.format=prompt_completion", "data.train.0.fields={prompt: ask, completion: say}")
    (source,) = written("a.jsonl", *words).data.train
    assert (source.format, source.fields) == ("prompt_completion", {"prompt": "ask", "completion": "say"})
    with pytest.raises(UserError, match=r"^argument train\.lr: .*set it in the config$"):
        init.main(["a.jsonl", "train.lr=1", "--out", "b.yaml"])


def test_data_of_the_hub_is_left_to_the_run() -> None:
    found = written("hf://tatsu-lab/alpaca")
    assert (found.run.name, found.data.train[0].path) == ("alpaca", "hf://tatsu-lab/alpaca")
    assert found.data.eval_fraction == 0.05


def test_nothing_is_overwritten_or_left_behind() -> None:
    good = rows("good.jsonl", range(40))
    Path("bad.jsonl").write_text('{"a": 1}\n' * 20)
    Path("mine.jsonl").write_text("mine")
    Path("x.rows.jsonl").write_text("mine")
    for words, said in (
        (["bad.jsonl"], r"^data\.train\.0: none of the 14 rows read can be used"),
        (["nowhere.jsonl"], r"^data\.train\.0\.path: .*nowhere\.jsonl: no such file or folder$"),
        (["goood.jsonl"], r"/goood\.jsonl: no such file or folder; did you mean /.*/good\.jsonl\?$"),
        ([], "^arguments: expected DATA and an optional MODEL; --help shows how"),
        ([good, "model", "more"], "^arguments: expected DATA"),
        ([good, good, "--out", "mine.jsonl"], r"^mine\.jsonl: exists already; move it away, or name another config"),
        ([rows("twice.jsonl", [1] * 40), "--out", "x.yaml"], r"^x\.rows\.jsonl: exists already; move it away"),
    ):
        with pytest.raises(UserError, match=said):
            init.main(words)
    assert not list(Path().glob("*.yaml"))
    init.main([good])
    before = Path("my_run.yaml").read_text()
    with pytest.raises(UserError, match=r"^my_run\.yaml: exists already; move it away, or name another"):
        init.main([good])
    assert Path("my_run.yaml").read_text() == before
