"""The page of a run says first whether it is better and by how much, then where it is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray import Result
from olora_ray.common.errors import UserError
from olora_ray.pipeline import look
from olora_ray.pipeline.answers import Sample, judged, means
from olora_ray.train.checkpoint import TrainState
from tests import browser, tiny

MARKS = ["<|im_start|>", "<|im_end|>"]
LONG = "word " * 40 + "a" * 300
PROMPT = f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant"
LABELS = ("billing", "delivery and damage", "refund")
HISTORY = [
    {"step": 0.0, "eval/loss": 2.0},
    {"step": 1.0, "train/loss": 1.5},
    {"step": 2.0, "train/loss": 1.0, "eval/loss": 0.5},
]


def texts(right_before: int, right_after: int, rows: int) -> list[Sample]:
    """Answers to `rows` prompts, of which the first ones are right."""
    return [
        Sample(
            PROMPT,
            f"answer {LONG} {number}",
            f"answer {LONG} {number}" if number < right_before else LONG,
            f"answer {LONG} {number}" if number < right_after else "",
        )
        for number in range(rows)
    ]


def labelled() -> list[Sample]:
    """30 answers with a label; every tenth is wrong."""
    return [
        Sample(PROMPT, LABELS[number % 3], LONG, LABELS[(number % 3 + (number % 10 == 0)) % 3])
        for number in range(30)
    ]


KINDS: dict[str, tuple[list[Sample], str | None, str]] = {
    "good": (texts(0, 24, 25), "exact_match", "24 of 25 right, the base model 0 of 25"),
    "bad": (texts(20, 2, 25), "exact_match", "2 of 25 right, the base model 20 of 25"),
    "few": (texts(0, 3, 4), "exact_match", "3 of 4 right, the base model 0 of 4"),
    "labels": (labelled(), "exact_match", "27 of 30 right, the base model 0 of 30"),
    "texts": (texts(0, 0, 3), None, "0.5000, the base model 2.0000"),
}


def ended(folder: Path, answers: Sequence[Sample], scorer: str | None) -> look.Ended:
    config = tiny.config(run__name="mine", run__storage=str(folder), evaluation__scorer=scorer)
    scored = judged(config, answers)
    result: dict[str, Any] = {
        "scores": means(scored),
        "metrics": {"eval/loss": 0.5},
        "eval_loss_before": 2.0,
        "mlflow": {"uri": "sqlite:////runs/mlflow.db", "run_id": "cafe"},
        "registered": None,
    }
    state = TrainState(2, 0.5, 2, history=HISTORY)
    return look.Ended(config.folder(), config, state, result, answers, scored, MARKS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_and_the_page_in_a_browser(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, scorer, counts = KINDS[kind]
    run = ended(tmp_path, answers, scorer)
    verdict, grade = look.verdict(run, look.gains(run))
    assert counts in verdict
    assert grade == {"good": "good", "labels": "good", "bad": "bad"}.get(kind, "")
    assert look.write(run, None) == verdict
    look.main([run.root])
    printed = capsys.readouterr().out.splitlines()
    assert " ".join(printed[:-1]) == verdict
    page = Path(printed[-1])
    assert verdict in Result(run.root, 2.0, 0.5, {}, None)._repr_html_().replace("&amp;", "&")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium")
    script = """(() => {
        const first = document.querySelector(".verdict").getBoundingClientRect();
        const shown = () => document.querySelectorAll(".answer:not([hidden])").length;
        const set = (name, value) => {
            const found = document.getElementById(name);
            if (found) { found.value = value; found.dispatchEvent(new Event("change")); }
            return shown();
        };
        return {over: document.documentElement.scrollWidth - innerWidth, bottom: first.bottom,
            change: shown(), all: set("change", ""), label: set("label", "refund")};
    })()"""
    wrong = {"good": 1, "bad": 23, "few": 1, "labels": 3, "texts": 3}[kind]
    for width in (390, 1400):
        found = browser.measured(page, script, width, dark=width == 390)
        assert found["over"] <= 0
        assert found["bottom"] < 700
        assert (found["change"], found["all"]) == (wrong, len(answers))
        assert found["label"] == (10 if kind == "labels" else len(answers))


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_end_of_a_long_prompt_is_seen(tmp_path: Path) -> None:
    run = ended(tmp_path, [Sample("a tool\n" * 60 + "Why?", "so", "no", "so")], None)
    look.write(run, None)
    script = """(() => {
        const prompt = document.querySelector(".prompt"), text = document.createRange();
        text.selectNodeContents(prompt);
        const [box, all] = [prompt, text].map(each => each.getBoundingClientRect());
        return {hidden: all.bottom - box.bottom, above: box.top - all.top};
    })()"""
    found = browser.measured(Path(run.root, "report.html"), script, 390)
    assert found["hidden"] < 1
    assert found["above"] > 100


def test_the_marks_of_a_template_are_no_part_of_a_prompt() -> None:
    assert look.plain("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant", MARKS) == "Why?"
    assert look.plain("Why? assistant", MARKS) == "Why? assistant"


def test_pairs_have_an_interval_of_the_share_that_is_preferred(tmp_path: Path) -> None:
    run = ended(tmp_path, [], None)
    grades = []
    for share, rows in ((0.9, 40), (0.55, 40), (0.1, 40), (1.0, 4)):
        metrics = {"eval/loss": 0.5, "eval/pairs/preferred": share}
        result = {**run.result, "metrics": metrics}
        of_pairs = look.Ended(run.root, run.config, run.state, result, [], ([], []), held_out=rows)
        grades.append(look.verdict(of_pairs, [])[1])
    assert grades == ["good", "", "bad", ""]


def test_a_name_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        look.main(["nope"])
