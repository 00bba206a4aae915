"""A prompt to the base model and to the fine-tuned model of a finished run, without Ray."""

import io
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ray

from olora_ray.common import records
from olora_ray.evaluation import chat
from olora_ray.evaluation.export import given
from olora_ray.tracking import models
from tests import finished_run
from tests.finished_run import FinishedRun
from tests.refused import refused
from tests.said import said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run.make(tmp_path_factory.mktemp("project"), run__name="mine")


@pytest.fixture
def there(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the run was started."""
    monkeypatch.chdir(Path(run.config.run.storage).parent)
    return Path.cwd()


def expected(run: FinishedRun, asked: str | list[dict[str, str]], new: int = 5) -> str:
    """Return the answers of transformers and PEFT to a chat or text, in the form that `chat` prints."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(run.config.model.name)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.folder.adapter)
    if not isinstance(asked, str):
        asked = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def answer(model: Any) -> str:
        found = model.generate(input_ids=ids, max_new_tokens=new, do_sample=False)[
            0, ids.shape[1] :
        ]
        return textwrap.indent(
            tokenizer.decode(found, skip_special_tokens=True).strip() or "(nothing)", "    "
        )

    before, after = answer(base), answer(PeftModel.from_pretrained(base, run.folder.adapter))
    assert before != after
    return f"base:\n{before}\n\nfine-tuned:\n{after}\n\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_both_models_answer_a_prompt(
    run: FinishedRun, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.main(["mine", "after x=3?"])
    assert capsys.readouterr().out == expected(run, [user("after x=3?")])
    assert not ray.is_initialized()


def test_a_system_message_and_a_length_are_taken(
    run: FinishedRun, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.main([run.folder.root, "evaluation.max_new_tokens=9", "after 5?", "--system", "count"])
    system = {"role": "system", "content": "count"}
    assert capsys.readouterr().out == expected(run, [system, user("after 5?")], new=9)


def test_the_system_message_of_all_rows_is_sent_without_asking(
    run: FinishedRun, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = there / "train.jsonl"
    before = rows.read_text()
    system = {"role": "system", "content": "count"}
    try:
        told = before.replace('[{"role": "user"', f'[{json.dumps(system)}, {{"role": "user"')
        rows.write_text(told)
        with said() as lines:
            chat.main(["mine", "after 5?"])
        assert capsys.readouterr().out == expected(run, [system, user("after 5?")])
        assert "system message of the data: count (--system TEXT sets another)" in lines
        as_version(run)
        rows.unlink()  # the version has kept the message
        with given("small@candidate", {}) as exported:
            assert exported.system == "count"
        chat.main(["small@candidate", "after 5?"])
        tuned = capsys.readouterr().out
        assert tuned in expected(run, [system, user("after 5?")])
        assert tuned not in expected(run, [user("after 5?")])
        rows.write_text(before + told)
        chat.main(["mine", "after 5?"])
        assert capsys.readouterr().out == expected(run, [user("after 5?")])
    finally:
        rows.write_text(before)


def as_version(run: FinishedRun) -> None:
    """Register the run, and name the run of MLflow in its result, as the end of a training does."""
    run.registered()
    version = models.resolve("models:/small@candidate", run.aliases.uri)
    result = records.read(run.folder.result, dict[str, Any]) or {}
    run.folder.write_result({**result, "mlflow": {"run_id": version.run_id}})


def test_each_line_of_the_input_is_a_prompt_of_its_own(
    run: FinishedRun,
    there: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("after 1?\n\nafter 2?"))
    chat.main(["mine"])
    assert capsys.readouterr().out == "".join(
        expected(run, [user(f"after {number}?")]) for number in (1, 2)
    )


def test_a_run_on_texts_goes_on_with_the_prompt(
    run: FinishedRun, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.folder.root, there / "runs" / "texts")
    settings = there / "runs" / "texts" / "config.yaml"
    settings.write_text(settings.read_text().replace("format: messages", "format: text"))
    with refused("argument --system"):
        chat.main(["texts", "after", "--system", "count"])
    chat.main(["texts", "one, two, ", "evaluation.max_new_tokens=20"])
    assert capsys.readouterr().out == expected(run, "one, two, ", new=20)


def test_what_cannot_be_asked_is_one_line(run: FinishedRun, there: Path) -> None:
    (there / "runs" / "begun").mkdir()
    (there / "runs" / "begun" / "config.yaml").touch()
    for words, told in (
        (["mine", "after", "3?"], "arguments: expected RUN"),
        (["other", "hi"], f"run other: no such run folder; {there}/runs has"),
        (["begun", "hi"], "run begun: not finished"),
        (["mine", "hi", "train.lrr=3"], "train.lrr: unknown field"),
    ):
        with refused(told):
            chat.main(words)
