"""A config for rows that nobody has described."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config import command_line
from olora_ray.config.load import load_config, override, parse_yaml
from olora_ray.config.schema import Config
from olora_ray.evaluation.groups import count_planned
from olora_ray.pipeline.dry_run import dry_run
from olora_ray.tokens.prepare import plan_here
from pipelines import init
from tests import tiny
from tests.pipelines import project
from tests.refused import refused
from tests.said import said
from tests.terminal import Terminal
from tests.tokens import helpers
from tests.tools.test_configuration_page import mistakes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(file: str, numbers: Sequence[int]) -> str:
    chats = (
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}"}]
        for n in numbers
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def model(folder: str) -> str:
    """A folder that init takes for a model."""
    Path(folder).mkdir()
    Path(folder, "config.json").write_text("{}")
    return folder


def written(*words: str, out: str = "my_run.yaml") -> Config:
    init.main([*words])
    return load_config(out)


def test_the_config_is_one_that_an_editor_and_a_run_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = written(rows("chats.jsonl", range(200)), model("model"))
    assert (found.run.name, found.model.name, found.registry.model) == ("chats", "model", "chats")
    assert [each.path for each in found.data.train] == ["chats.jsonl"]
    assert (found.data.eval, found.data.eval_fraction) == ((), 0.15)
    assert (
        found.train.global_batch
        >= tiny.decided(found).train.micro_batch * tiny.decided(found).cluster.most
    )
    printed = capsys.readouterr().out
    assert printed.startswith(
        "chats.jsonl: 200 messages rows in jsonl\nheld out: eval_fraction: 0.15  # about 30 rows\n"
    )
    assert re.findall(r"^  olora-ray (.*?)(?:  #.*)?$", printed, re.MULTILINE) == [
        "finetune my_run.yaml --dry-run",
        "finetune my_run.yaml",
        "chat chats",
        "retrain my_run.yaml",
    ]
    text = Path("my_run.yaml").read_text(encoding="utf-8")
    assert (
        "too_long: drop_turns  # rows with more tokens than max_length lose their last turns"
        in text
    )
    assert mistakes("config", parse_yaml(text, "my_run.yaml")) == []
    assert Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")).is_file()
    assert sorted(each.name for each in Path().iterdir()) == ["chats.jsonl", "model", "my_run.yaml"]


@pytest.mark.parametrize("count", [10, 30_000])
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
        (["chats.jsonl", "test.jsonl"], "chats.jsonl", None),
        (["d/rows.jsonl", "d/held_out_rows.jsonl"], "d/rows.jsonl", "d/held_out_rows.jsonl"),
        (["d/1/rows.jsonl", "d/1/held_out_rows.jsonl"], "d", "d/**/held_out_*"),
        (["d/1/rows.jsonl", "d/1/held_out_rows.jsonl"], "d/*/r*", "d/*/held_out_r*"),
    ],
)
def test_rows_that_are_held_out_by_name_are_held_out(
    files: list[str], data: str, held_out: str | None
) -> None:
    for number, file in enumerate(files):
        rows(file, range(100 * number, 100 * number + 30))
    found = written(data)
    assert [each.path for each in found.data.eval] == ([held_out] if held_out else [])
    assert (found.data.eval_fraction is None) == (held_out is not None)


def test_copies_and_rows_without_an_answer_leave_the_data_where_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(project.make_model(folder / "model"))
    rows("chats/day1.jsonl", [*range(200), *range(50)])
    rows("chats/day2.jsonl", range(300, 400))
    with Path("chats/day2.jsonl").open("a") as lines:
        lines.write(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    for number, data in enumerate(("chats", "chats/*.jsonl")):
        found = written(data, base, "--out", f"{number}.yaml", out=f"{number}.yaml")
        assert [each.path for each in found.data.train] == [data]
        printed = capsys.readouterr().out
        assert re.search(
            r"\n1 of them cannot be used, the first is .*/day2\.jsonl:101: no_answer: ", printed
        )
        with said() as lines:
            dry_run(command_line.resolved(found, folder))
        left_out = "copies of held-out rows, left out of the training: "
        assert len([line for line in lines if left_out in line]) == 1
    assert sorted(each.name for each in Path().rglob("*.jsonl")) == ["day1.jsonl", "day2.jsonl"]


def test_a_text_of_which_nothing_can_be_held_out_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("notes.txt").write_text("The pump is checked every month.\n" * 90)
    written("notes.txt", rows("chats.jsonl", range(60)))
    _, _, after = capsys.readouterr().out.partition("held out: eval_fraction: ")
    assert re.search(r"^notes\.txt .*data\.eval", after, re.M)
    assert not re.search(r"^chats\.jsonl", after, re.M)


def test_texts_in_a_folder_of_other_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows("data/chats.jsonl", range(200))
    Path("data/notes.txt").write_text("The pump is checked every month.")
    written("data")
    assert "*.txt" in capsys.readouterr().out
    assert (
        len(written("data/*.txt", "data/*.jsonl", "--out", "b.yaml", out="b.yaml").data.train) == 2
    )
    assert "DATA" not in capsys.readouterr().out


def test_rows_that_cannot_be_used_are_refused_as_a_run_refuses_them() -> None:
    Path("q.csv").write_text(
        "question,answer\n" + "".join(f"{n}?,{n if n % 3 else ''}\n" for n in range(102))
    )
    with refused("data.train.0: 34 of 102 rows cannot be used"):
        init.main(["q.csv"])
    assert not Path("my_run.yaml").exists()
    assert written("q.csv", "data.max_rejected=0.334").data.max_rejected == 0.334


def test_empty_texts_are_counted_without_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [json.dumps({"text": "" if n % 3 else f"line {n}"}) for n in range(90)]
    Path("wiki.jsonl").write_text("\n".join(texts))
    written("wiki.jsonl")
    printed = capsys.readouterr().out
    assert "\n60 of them are empty, and are left out\n" in printed
    assert "cannot be used" not in printed


def test_rows_of_large_files_with_line_breaks_are_estimated_as_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    mails = ((f"{n} " + "line\n" * 400, "Thanks.") for n in range(2**25 // 1000))
    with Path("mails.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *mails])
    assert written("mails.csv").data.eval_fraction == 0.03
    assert capsys.readouterr().out.startswith("mails.csv: about 33,")


@pytest.mark.parametrize("count", [100, 1000])
def test_enough_rows_are_held_out_for_the_second_night(count: int, folder: Path) -> None:
    found = written(rows("a.jsonl", range(count)))
    config = command_line.resolved(override(found, {"data.train.0.format": "messages"}), folder)
    plan = plan_here(override(config, {"data.max_length": 64}), helpers.spec(), "eval")
    assert count_planned(None, plan, 1000) >= found.gate.min_rows


@pytest.mark.parametrize(
    ("words", "data", "named"),
    [
        ("a.jsonl b.csv --model base", ["a.jsonl", "b.csv"], "base"),
        ("a.jsonl org/model", ["a.jsonl"], "org/model"),
        ("a.jsonl --name mine", ["a.jsonl"], None),
    ],
)
def test_several_sources_and_a_model(words: str, data: list[str], named: str | None) -> None:
    rows("a.jsonl", range(60))
    Path("b.csv").write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(60)))
    model("base")
    found = written(*words.split())
    assert [each.path for each in found.data.train] == data
    assert found.model.name == (named or init.PACKAGED)
    assert found.run.name == found.registry.model == ("mine" if "mine" in words else "a")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("tokens.jsonl", "tokens-run"),
        ("5 'äé\": #.jsonl", "5"),
        ("support/*.jsonl", "support"),
    ],
)
def test_any_path_is_written_as_it_is_and_gives_a_name(data: str, name: str) -> None:
    rows(data.replace("*", "a"), range(30))
    found = written(data, model("1e3"), "--out", "x.yaml", out="x.yaml")
    assert (found.data.train[0].path, found.run.name, found.model.name) == (data, name, "1e3")


def test_fields_of_the_data_are_taken_and_no_others() -> None:
    Path("a.jsonl").write_text(
        "".join(json.dumps({"ask": f"{n}?", "say": "2"}) + "\n" for n in range(20))
    )
    words = (
        "data.train.0.format=prompt_completion",
        "data.train.0.fields={prompt: ask, completion: say}",
    )
    (source,) = written("a.jsonl", *words).data.train
    assert (source.format, source.fields) == (
        "prompt_completion",
        {"prompt": "ask", "completion": "say"},
    )
    with refused("argument train.lr"):
        init.main(["a.jsonl", "train.lr=1", "--out", "b.yaml"])


def test_nothing_is_overwritten_or_left_behind() -> None:
    good = rows("good.jsonl", range(40))
    Path("bad.jsonl").write_text('{"a": 1}\n' * 20)
    Path("mine.jsonl").write_text("mine")
    Path("runs/few").mkdir(parents=True)
    for words, told in (
        (["bad.jsonl"], "bad.jsonl:1: no format has these columns"),
        (["nowhere.jsonl"], "data.train.0.path"),
        ([], "arguments: expected DATA"),
        ([good, "modell"], "model.name: modell"),
        ([good, "--out", "mine.jsonl"], "mine.jsonl: exists already"),
        ([good, "--out", "nofolder/x.yaml"], "--out nofolder/x.yaml"),
        ([rows("three.jsonl", range(3))], "three.jsonl: 3 rows are too few"),
        ([rows("few.jsonl", range(40))], "runs/few: exists already"),
    ):
        with refused(told):
            init.main(words)
    assert not list(Path().glob("*.yaml"))
    assert Path("mine.jsonl").read_text() == "mine"


def test_what_nothing_reads_is_written_as_left_out_with_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        {"question": f"Where is {n}?", "answer": "here", "topic": "a: b # c"} for n in range(40)
    ]
    Path("asked.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    init.main(["asked.jsonl"])
    assert "left out: topic" in capsys.readouterr().out
    text = Path("my_run.yaml").read_text()
    assert 'topic: none  # such as "a: b # c"' in text
    assert load_config("my_run.yaml").data.train[0].fields == {"topic": "none"}


def test_at_a_terminal_the_columns_are_asked_for_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"ticket": f"Where is {n}?", "reply_of_agent": "here"} for n in range(40)]
    Path("asked.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr("sys.stdin", Terminal("ticket\nreply_of_agent\n"))
    init.main(["asked.jsonl"])
    fields = load_config("my_run.yaml").data.train[0].fields
    assert fields == {"instruction": "ticket", "output": "reply_of_agent"}
    asked, _, _ = capsys.readouterr().out.partition("question: ")
    assert re.findall(r"^  (\w+) \(", asked, re.M) == ["ticket", "reply_of_agent"]
    assert "data.train.0.fields" not in asked  # that is for a script


def test_rows_are_counted_where_cells_have_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    mails = [["question", "answer"]]
    mails += [[f"Dear all,\nwhere is {n}?\n" + "x\n" * 10, f"Here;\n{n}"] for n in range(90)]
    with Path("mails.csv").open("w", newline="", encoding="cp1252") as file:
        csv.writer(file, delimiter=";").writerows(mails)
    init.main(["mails.csv"])
    printed = capsys.readouterr().out
    assert printed.startswith("mails.csv: 90 alpaca rows in semicolon csv")
    assert "about 22 rows" in printed


def test_labels_are_scored_by_equality_and_named_in_the_system_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, count in (("train.jsonl", 60), ("test.jsonl", 12)):
        lines = [
            {"text": f"Where is {n}?", "kind": ["open", "in work"][n % 3 == 0]}
            for n in range(count)
        ]
        Path(file).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    init.main(["train.jsonl", "data.train.0.fields={instruction: text, output: kind}"])
    assert "2 labels; the rarest, 'in work', has 20 rows" in capsys.readouterr().out
    found = load_config("my_run.yaml")
    assert (found.evaluation.scorer, found.evaluation.max_new_tokens) == ("macro_f1", 8)
    for source in (*found.data.train, *found.data.eval):
        assert source.system == "Answer with one of: open, in work"
        assert source.fields == {"instruction": "text", "output": "kind"}


@pytest.mark.parametrize(("each", "held_out", "rare"), [(25, 200, 5), (8, 250, 2), (300, 50, 15)])
def test_enough_rows_are_held_out_to_judge_a_rare_label(
    each: int, held_out: int, rare: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for n in range(1000):
        label = "rare" if n < each else "usual"
        lines.append(json.dumps({"instruction": f"{n}?", "output": label}))
    Path("a.jsonl").write_text("\n".join(lines))
    assert written("a.jsonl").data.eval_fraction == held_out / 1000
    told = f"  # about {held_out} rows; about {rare} with the rarest label\n"
    assert told in capsys.readouterr().out


def test_labels_of_a_prompt_get_no_system_message_because_it_may_be_no_chat() -> None:
    lines = [{"prompt": f"{n}?", "completion": ["even", "odd"][n % 2]} for n in range(60)]
    Path("a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = written("a.jsonl")
    assert found.evaluation.scorer == "macro_f1"
    assert found.data.train[0].system is None


def test_a_terminal_that_closes_gets_the_question_as_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("asked.jsonl").write_text('{"ticket": "a", "reply_of_agent": "b"}\n' * 40)
    monkeypatch.setattr("sys.stdin", Terminal("ticket\n"))
    with refused("which column is the answer?"):
        init.main(["asked.jsonl"])


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with user') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "Be brief."}


def chats(first: Sequence[object] = (), **columns: object) -> str:
    lines = []
    for n in range(40):
        asked = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]
        lines.append(json.dumps({"messages": [*first, *asked], **columns}) + "\n")
    Path("chats.jsonl").write_text("".join(lines))
    return "chats.jsonl"


def with_template(template: object) -> str:
    settings = json.dumps({"chat_template": template})
    Path(model("model"), "tokenizer_config.json").write_text(settings)
    return "model"


@pytest.mark.parametrize(
    ("template", "chat", "chosen"),
    [
        (CHATML, {"tools": [TOOL]}, "chatml-tools"),
        (None, {"tools": [TOOL]}, "chatml-tools"),
        ([{"name": "default", "template": GEMMA}], {"first": [SYSTEM]}, "gemma"),
        (CHATML, {"first": [SYSTEM]}, None),
    ],
)
def test_a_template_that_cannot_write_the_chats_is_replaced_by_one_with_its_marks(
    template: object, chat: dict[str, Any], chosen: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = written(chats(**chat), with_template(template))
    assert found.data.chat_template == chosen
    printed = capsys.readouterr().out
    assert (f"chat_template: {chosen}, because" in printed) == bool(chosen)
    assert "set data.chat_template" not in printed  # init has set it


def test_the_small_models_own_file_shows_its_template() -> None:
    assert written(chats(tools=[TOOL])).data.chat_template == "chatml-tools"


def test_a_template_that_no_other_is_like_is_refused_with_one_to_choose() -> None:
    data = chats(tools=[TOOL])
    own = with_template(GEMMA)
    with refused(
        "chats.jsonl:1: template: the chat template of model does not write the tools: set"
    ):
        init.main([data, own])
    assert not Path("my_run.yaml").exists()
    found = written(data, own, "data.chat_template=chatml-tools")
    assert found.data.chat_template == "chatml-tools"


def test_a_few_chats_that_do_not_fit_keep_the_models_template(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = rows("chats.jsonl", range(200))
    first, *others = Path(file).read_text().splitlines()
    with_tools = json.dumps({**json.loads(first), "tools": [TOOL]})
    Path(file).write_text("\n".join([first, *others, with_tools]))
    assert written(file, with_template(CHATML)).data.chat_template is None
    assert re.search(r"\n1 of the rows cannot .*chats\.jsonl:201: ", capsys.readouterr().out)


def test_the_run_takes_the_template_that_init_has_written(folder: Path) -> None:
    base = project.make_model(folder / "model")
    (base / "chat_template.jinja").write_text(CHATML)
    found = written(chats(tools=[TOOL]), str(base))
    with said() as lines:
        dry_run(command_line.resolved(found, folder))
    assert not [line for line in lines if "rejected" in line]


def test_a_template_without_system_messages_gets_none_for_labels() -> None:
    lines = [{"instruction": f"{n}?", "output": ["even", "odd"][n % 2]} for n in range(60)]
    Path("a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = written("a.jsonl", with_template(GEMMA))
    assert (found.data.train[0].system, found.data.chat_template) == (None, None)


def test_pairs_get_one_epoch_and_a_weight_of_their_chosen_answers() -> None:
    pairs = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": "no"} for n in range(60)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = written("p.jsonl")
    assert (config.train.epochs, config.train.chosen) == (1, 0.1)
    text = Path("my_run.yaml").read_text()
    assert "# preference pairs in jsonl" in text
    assert "too_long" not in text
