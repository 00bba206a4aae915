"""A new user's first days, with what the README installs: own files, a stop, a champion, and new files each night."""

import csv
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests.installed import Command
from tests.pipelines import project

QUESTIONS = "Wo ist Paket {}?", "Wann kommt Bestellung {}?", "Wie storniere ich Auftrag {}?"


def pairs(numbers: Iterable[int]) -> list[tuple[str, str]]:
    return [(QUESTIONS[n % 3].format(n), f"Nummer {n} ist übermorgen da.") for n in numbers]


def chats(file: Path, numbers: Sequence[int]) -> None:
    file.parent.mkdir(exist_ok=True)
    roles = ("system", "user", "assistant")
    with file.open("a", encoding="utf-8") as lines:
        for pair in pairs(numbers):
            texts = ("Antworte kurz.", *pair)
            messages = [
                {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def own_files(folder: Path) -> None:
    """Fill the folder with a model, 150 chats, and a table with German columns."""
    project.make_model(folder / "model")
    chats(folder / "chats.jsonl", range(150))
    with (folder / "fragen.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table, delimiter=";").writerows([("frage", "antwort"), *pairs(range(60))])


def days(folder: Path) -> None:
    """Fill the folder with a model, and a folder of three days with copies."""
    project.make_model(folder / "model")
    for day in range(3):
        chats(folder / "tage" / f"tag{day}.jsonl", range(60 * day, 60 * day + 60))
    chats(folder / "tage" / "tag2.jsonl", range(25))


def trained_files(folder: Path) -> list[set[str]]:
    """Return the names of the files of each store of training rows, the smallest first."""
    manifests = [
        json.loads(file.read_text())
        for file in (folder / "runs" / "tokens").glob("*/manifest.json")
    ]
    stores = [each for each in manifests if each["inputs"]["split"] == "train"]
    assert all(each["notes"].get("copies") for each in stores)
    return sorted(({Path(file).name for file in each["files"]} for each in stores), key=len)


@pytest.fixture
def ran(olora_ray: Command, tmp_path: Path) -> Callable[..., str]:
    """`ran(line, code, stop_at)`: what a command prints that ends with this exit code."""

    def run(line: str, code: int = 0, stop_at: str = "") -> str:
        done = olora_ray(*shlex.split(line), folder=tmp_path, stop_at=stop_at)
        assert done.returncode == code, f"{line}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr + done.stdout
        return done.stdout + done.stderr

    return run


@pytest.mark.slow  # in make test: tests/test_wheel.py and tests/pipelines/test_init.py
def test_own_files_are_planned(ran: Callable[..., str], tmp_path: Path) -> None:
    own_files(tmp_path)
    ran("init chats.jsonl model --out chats.yaml")
    ran(
        "init fragen.csv model --out fragen.yaml 'data.train.0.fields={instruction: frage, output: antwort}'"
    )
    for config in ("chats", "fragen"):
        assert "examples, with the supervised tokens in [[ ]]" in ran(
            f"finetune {config}.yaml --dry-run"
        )
    made = {"chats.jsonl", "chats.yaml", "fragen.csv", "fragen.yaml", "model"}
    assert {each.name for each in tmp_path.iterdir()} - {"runs"} == made


@pytest.mark.ray
@pytest.mark.parametrize("nights", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_new_users_first_days(ran: Callable[..., str], tmp_path: Path, nights: int) -> None:
    days(tmp_path)
    assert "30 rows" in ran("init tage model --out tage.yaml")
    if nights > 1:  # in make test, tests/pipelines/test_finetune.py interrupts a run
        told = ran("finetune tage.yaml", 130, stop_at="step 0/")
        assert told.endswith("run the same command again to resume\n")
    told = ran("finetune tage.yaml")
    assert len(re.findall("copies of held-out rows, left out of the training: ", told)) == 1
    assert "registered:           tage version 1" in told
    told = ran("chat tage 'Wo ist Paket 7?'")
    assert "system message of the data: Antworte kurz." in told
    assert "fine-tuned:" in told
    ran("registry promote tage 1")
    assert re.search(r"^1 +.*champion", ran("registry list tage"), re.MULTILINE)
    for night in range(nights):
        chats(
            tmp_path / "tage" / f"tag{3 + night}.jsonl",
            [*range(300 + 40 * night, 340 + 40 * night), *range(5)],
        )
        told = ran("retrain tage.yaml")
        assert re.search(rf"^{2 + night} ", ran("registry list tage"), re.MULTILINE), told
    assert "nothing" in ran("retrain tage.yaml")
    assert trained_files(tmp_path) == [
        {f"tag{day}.jsonl" for day in range(3 + night)} for night in range(nights + 1)
    ]
    assert "eval/loss" in ran("evaluate runs/tage")
    assert "tage" in ran("runs")
    assert {each.name for each in tmp_path.iterdir()} == {"model", "runs", "tage", "tage.yaml"}
