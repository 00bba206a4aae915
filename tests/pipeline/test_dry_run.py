"""The dry run's page: one screen, with what is true of the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config import command_line
from olora_ray.pipeline.dry_run import dry_run
from tests.pipelines import project
from tests.refused import refused
from tests.said import said

Shown = Callable[..., tuple[str, list[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def shown(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Shown:
    """`shown(**changes)`: the page and the log lines of a dry run on 60 rows, with 7 held out."""
    project.make_corpus(tmp_path / "train.jsonl", 60)
    project.make_corpus(tmp_path / "eval.jsonl", 7, first=100)

    def show(show_config: bool = False, **changes: Any) -> tuple[str, list[str]]:
        file = project.write_config(tmp_path, project.settings(tmp_path, model, **changes))
        config, _ = command_line.read_arguments([str(file)], "usage")
        with said() as lines:
            dry_run(config, show_config)
        assert not (tmp_path / "runs" / "small").exists()
        return capsys.readouterr().out, lines

    return show


def value(page: str, label: str) -> str:
    """What stands beside a label."""
    found = re.search(rf"^{re.escape(label)} +(.+)$", page, re.MULTILINE)
    assert found, page
    return found[1]


def test_one_screen_with_everything(shown: Shown) -> None:
    page, lines = shown()
    assert len(page.splitlines()) + len(lines) < 40
    assert value(page, "targets").startswith("2 x 7 layers: q_proj 64 x 64, k_proj 32 x 64, ")
    assert value(page, "data.train.0").endswith("train.jsonl (messages): 60 rows read")
    assert value(page, "data.eval.0").endswith("eval.jsonl (messages): 7 rows read")
    assert value(page, "rows") == "60, none rejected"
    assert value(page, "held out") == "7, none rejected; 3 sequences"
    assert re.fullmatch(r"\d+ of at most 64 tokens, fill 0\.\d\d", value(page, "sequences"))
    assert re.fullmatch(r"\d+ per epoch, \d+% of them supervised", value(page, "tokens"))
    assert value(page, "example length").startswith("13 to 15 tokens; 50% have up to 15")
    assert (
        value(page, "training")
        == "6 steps; 4 sequences per step = 2 workers x 2 (1 at once, 2 accumulated)"
    )
    assert re.match(
        r"about [\d.]+ s for 6 steps of about [\d.e-]+ s and 3 evaluations", value(page, "time")
    )
    # What takes seconds is told before it begins.
    lines = [
        line for line in lines if " rows in " not in line and ": auto is " not in line
    ]  # the formats, which a command finds before, and decisions, which follow one another
    told = (
        "opening the base model",
        "model: ",
        "memory per worker",
        "reading rows",
        "training on one micro-batch",
    )
    assert [line.startswith(start) for line, start in zip(lines, told, strict=True)] == [True] * 5
    # Two examples, with what is supervised.
    texts = re.findall(
        r"^.*train\.jsonl:(\d+): \d+ tokens, (\d+) supervised\n    (.+)$", page, re.MULTILINE
    )
    assert len(texts) == 2
    for line, count, text in texts:
        number = int(line) - 1
        assert text == f"<|user|>after {number}?<|end|><|assistant|>[[{number + 1}<|end|>]]"
        assert int(count) == len(str(number + 1)) + 1


@pytest.mark.parametrize(
    ("letters", "too_long", "number", "longest"),
    [
        (10, "reject", 256, 17),
        (900, "reject", 960, 905),
        (3000, "reject", 256, 17),
        (3000, "cut", 2048, 2048),
    ],
)
def test_the_length_of_sequences_is_that_of_the_longest_row_up_to_the_models_positions(
    letters: int, too_long: str, number: int, longest: int, shown: Shown, tmp_path: Path
) -> None:
    long = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a" * letters},
        ]
    }
    (tmp_path / "long.jsonl").write_text(project.json.dumps(long) + "\n")
    (tmp_path / "notes.txt").write_text("a text is cut into pieces " * 40)
    sources = [str(tmp_path / name) for name in ("train.jsonl", "long.jsonl", "notes.txt")]
    page, lines = shown(data__train=sources, data__max_length="auto", data__too_long=too_long)
    [line] = [line for line in lines if line.startswith("data.max_length: ")]
    assert line.startswith(f"data.max_length: auto is {number:,}: ")
    assert (f"the longest of 68 rows has {longest:,} tokens" in line) == (letters != 3000)
    assert f"of at most {number:,} tokens" in value(page, "sequences")
    rejected = (
        "1 rejected (too_long 1;" if (letters, too_long) == (3000, "reject") else "none rejected"
    )
    assert value(page, "rows").startswith(f"62, {rejected}")


def test_rejected_rows_are_counted_by_reason(shown: Shown, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
    (tmp_path / "bad.jsonl").write_text(project.json.dumps(bad) + "\n")
    odd = {"path": str(tmp_path / "b*.jsonl"), "format": "messages"}
    page, _ = shown(data__train=[str(tmp_path / "train.jsonl"), odd, str(tmp_path / "train.jsonl")])
    assert value(page, "data.train.1").endswith("(messages): 1 row read, 1 rejected")
    assert (
        value(page, "rows") == "121, 1 rejected (empty_answer 1; data.max_rejected = 0.01 allows 1)"
    )


def test_held_out_rows_that_are_trained_on_too_are_told_and_refused(
    shown: Shown, tmp_path: Path
) -> None:
    with refused("data.eval"):
        shown(data__train=[str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")])
    project.make_corpus(tmp_path / "eval.jsonl", 20, first=59)
    [line] = [line for line in shown()[1] if "training rows too" in line]
    assert line.startswith("warning: data.eval: 1 of 20 held-out rows are training rows too")


def test_it_ends_with_exit_code_2_where_the_run_would_be_stopped(
    tmp_path: Path, model: Path
) -> None:
    project.make_corpus(tmp_path / "train.jsonl", 60)
    project.make_corpus(tmp_path / "eval.jsonl", 30, first=100)
    long = {
        "messages": [{"role": "user", "content": "q" * 70}, {"role": "assistant", "content": "a"}]
    }
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write(2 * f"{project.json.dumps(long)}\n")
    done = project.finetune(
        project.write_config(tmp_path, project.settings(tmp_path, model)), "--dry-run", code=2
    )
    assert done.stderr.startswith("error: data.eval.0: 2 of 32 rows cannot be used")
    assert done.stderr.endswith("data.max_rejected=0.063\n")
    assert done.stderr.count("\n") == 1


def test_a_plan_that_does_not_fit_this_machine_is_shown_and_refused(
    shown: Shown, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With less that could be advised there is less to estimate.
    large = {
        "data__max_length": 2**25,
        "model__dtype": "bfloat16",
        "train__activation_checkpointing": True,
        "evaluation": {"samples": 0},
    }
    with refused("cluster.workers=2: each worker needs about "):
        shown(**large)
    assert "\nexamples, with the supervised tokens in [[ ]]\n" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert value(shown(**large)[0], "time").startswith("not estimated: the workers run on another")


def test_a_pair_is_shown_as_one_prompt_with_both_answers(shown: Shown, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "a b", "rejected": "ccccc"} for n in range(10, 34)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, lines = shown(data__train=[{"path": str(tmp_path / "pairs.jsonl")}], data__max_length=128)
    told = r"24, \d\.\d per sequence; prompt \d+, chosen 4, rejected 6 tokens \(medians\)"
    assert re.fullmatch(told, value(page, "pairs"))
    example = page.partition("examples")[2]
    assert "[[a b" in example.partition("  rejected answer:\n    [[ccccc")[0]
    assert [line for line in lines if "gate.metric" in line] == []


def test_held_out_pairs_decide_the_metric_of_the_gate(shown: Shown, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "a b", "rejected": "ccccc"} for n in range(10, 34)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"path": str(tmp_path / "pairs.jsonl")}]
    drawn = {"data__train": pairs, "data__eval": [], "data__eval_fraction": 0.3}
    preferred = {"metric": "eval/pairs/preferred", "at_least": 0.6}
    _, lines = shown(**drawn, data__max_length=128, gate={"and": [preferred]})
    assert any("gate.metric: auto is eval/pairs/loss: held-out rows of" in line for line in lines)
    with refused("gate: metric eval/pairs/preferred is not measured: no held-out pairs"):
        shown(data__train=pairs, data__max_length=128, gate={"and": [preferred]})
