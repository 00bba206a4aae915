"""Served chats are kept, rated and corrected at the port, and `olora-ray feedback` makes training data of them."""

import asyncio
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from olora_ray.serving import collect
from olora_ray.serving.keep import Keeper
from tests.refused import refused
from tests.serving.engine import Engine, following
from tests.serving.test_follow import Listening
from tests.serving.versions import FOLLOWED, NAME, Versions, registered
from tests.waiting import until

DAY = 86400.0
MODEL = f"{NAME}@1"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    with registered(tmp_path_factory.mktemp("feedback"), 1) as found:
        yield found


class Kept:
    """A keeper of answers, at a time that the test sets."""

    def __init__(self, folder: Path | str, **options: str) -> None:
        self.now = 1_000_000 * DAY / 50  # 2024-10-04
        self.folder = Path(folder)
        given = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        self.keeper = Keeper(
            {"--keep": str(folder), "--keep-share": "1", **given}, lambda: self.now
        )

    def answer(self, id: str, question: str = "2+2?", answer: str = "4", **choice: Any) -> None:
        body = {"messages": [{"role": "user", "content": question}]}
        message = {"role": "assistant", "content": answer}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
        content = json.dumps({"id": id, "choices": choices}).encode()
        self.keeper.answered(json.dumps(body).encode(), content, MODEL)

    def say(self, id: str, **about: Any) -> int:
        return self.keeper.said(id, about).result(30)

    def later(self, seconds: float) -> None:
        self.files()
        self.now += seconds

    def files(self) -> dict[str, int]:
        """Name -> number of lines, after all that waits is written."""
        self.say("unknown")
        return lines_of(self.folder)


def lines_of(folder: Path) -> dict[str, int]:
    files = sorted(folder.glob("*.jsonl"))
    return {file.name: len(file.read_text().splitlines()) for file in files}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_day_is_closed_at_midnight_and_old_ones_are_deleted(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", keep_days="1")
    kept.answer("a")
    assert kept.say("a", rating=1) == 204
    assert kept.files() == {"_2024-10-04.jsonl": 1, "_feedback-2024-10-04.jsonl": 1}
    kept.later(DAY)
    kept.answer("b")
    assert kept.say("a", rating=-1) == 204  # an answer of yesterday
    days = {"2024-10-04.jsonl": 1, "_2024-10-05.jsonl": 1}
    assert kept.files() == days | {"_feedback-2024-10-04.jsonl": 1, "_feedback-2024-10-05.jsonl": 1}
    kept.later(-DAY)  # the clock is set back: no row is lost
    kept.answer("c")
    kept.later(DAY)
    more = {"2024-10-04-more.jsonl": 1, "2024-10-05.jsonl": 1}
    assert more.items() <= kept.files().items()
    kept.later(2 * DAY)
    assert kept.files() == {}
    assert kept.say("a", rating=1) == 404


def test_what_is_kept_survives_a_restart_and_belongs_to_one_process(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.answer("a")
    kept.files()
    with refused("argument --keep"):
        Kept(tmp_path)
    script = "import sys; from tests.serving.test_feedback import Kept; kept = Kept(sys.argv[1])"
    script += "; print(kept.say('a', rating=1), kept.say('b', rating=1))"
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path.with_name("copy"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["204", "404"]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "2020-01-01.jsonl").write_text("{}\n")
    with refused("argument --keep"):
        Kept(tmp_path)
    with refused("argument --keep-days"):
        Kept(tmp_path / "new", keep_days="long")
    with refused("argument --redact"):
        Kept(tmp_path / "new", redact="no_such_module:clean")


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "length"},
        {"finish_reason": "tool_calls"},
        {"index": 1},
        {"message": {"role": "assistant", "content": " "}},
        {"message": None},
    ],
)
def test_only_whole_answers_are_kept(tmp_path: Path, choice: dict[str, Any]) -> None:
    kept = Kept(tmp_path)
    kept.answer("a", **choice)
    assert kept.say("a", rating=1) == 404
    kept.answer("b")
    assert kept.files() == {"_2024-10-04.jsonl": 1}


def test_the_folder_has_a_largest_size(tmp_path: Path) -> None:
    kept = Kept(tmp_path, keep_gb="0.000001")
    kept.answer("a", "long " * 500)
    kept.later(DAY)
    kept.answer("b", "short")
    assert kept.files() == {"_2024-10-05.jsonl": 1}


def clean(row: dict[str, Any]) -> dict[str, Any] | None:
    """The function of --redact in these tests."""
    text = json.dumps(row)
    if "drop" in text:
        return None
    if "fail" in text:
        raise ValueError(text)
    return json.loads(text.replace("Ada", "NAME"))  # type: ignore[no-any-return]


def test_names_are_removed_before_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(tmp_path, redact="tests.serving.test_feedback:clean")
    kept.answer("a", "I am Ada", "Hello Ada")
    kept.answer("b", "drop Ada")
    kept.answer("c", "fail Ada")
    kept.say("a", correction="Good day Ada")
    assert kept.files() == {"_2024-10-04.jsonl": 1, "_feedback-2024-10-04.jsonl": 1}
    assert "Ada" not in "".join(file.read_text() for file in tmp_path.iterdir())
    assert "Ada" not in caplog.text


def test_a_full_disk_loses_rows_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(tmp_path, keep_share="0")
    kept.files()
    (tmp_path / "_2024-10-04.jsonl").symlink_to("/dev/full")
    for id in "abc":
        kept.answer(id)
        assert kept.say(id, rating=1) == 503
    assert caplog.text.count("No space left") == 1
    (tmp_path / "_2024-10-04.jsonl").unlink()
    assert kept.say("a", rating=1) == 204


def test_from_the_port_to_pairs(
    versions: Versions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine("vllm", versions.base)
    folder = tmp_path / "kept"
    at = Listening(engine)
    del at.words[4:]  # no challenger
    at.words += ["--keep", str(folder), "--keep-share", "0"]

    def send(**body: Any) -> int:
        return requests.post(f"{at.url}/feedback", json=body, timeout=30).status_code

    def ask(question: str, **body: Any) -> str:
        headers = {"X-Request-Id": f"canary-id-{question}", "X-User": "canary-header"}
        chat = at.chat(messages=[{"role": "user", "content": f"canary {question}"}], **body)
        url = f"{at.url}/v1/chat/completions"
        assert requests.post(url, json=chat, headers=headers, timeout=30).ok
        return f"chatcmpl-canary-id-{question}"

    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy)
        for number in range(30):
            answer = ask(str(number), stream=number % 2 == 0)
            until(lambda answer=answer: send(id=answer, correction="right") == 204)
        thumbs = ask("good")
        until(lambda: send(id=thumbs, rating=1) == 204)
        assert send(id=thumbs, correction="first") == 204
        assert send(id=thumbs, correction="last") == 204
        assert send(id=thumbs, rating=-1) == 204  # a correction says more
        again = ask("2")
        until(lambda: send(id=again, correction="better") == 204)
        assert send(id="unknown", rating=1) == 404
        for wrong in (
            {"id": thumbs},
            {"id": thumbs, "rating": 5},
            {"id": thumbs, "correction": ""},
        ):
            assert send(**wrong) == 400
        assert send(id=thumbs, correction="x" * 2**20) == 413
        assert asyncio.run(at.ask_at_once(200)) == {"200 whole": 200}
        (day,) = folder.glob("_2*.jsonl")
        assert stat.S_IMODE(day.stat().st_mode) == 0o600
        assert "canary-header" not in "".join(file.read_text() for file in folder.iterdir())
        shown = requests.get(f"{at.url}/metrics", timeout=30).text
        assert "canary" not in shown + printed.log.read_text()
        kept = tmp_path / "copy"
        shutil.move(folder, kept)
        last = ask("removed")
        until(lambda: send(id=last, rating=1) == 503)
        at.answered(20)
    assert printed("No such file") == 1
    assert not printed("Traceback")
    out = tmp_path / "data"
    collect.main([str(kept), "--out", str(out), "--held-out", "0.3", "--rows"])
    table = capsys.readouterr().out
    assert MODEL in table
    pairs = rows(out / "pairs.jsonl") + rows(out / "held_out_pairs.jsonl")
    assert len(pairs) == 31
    assert {row["chosen"][0]["content"] for row in pairs} == {"right", "better", "last"}
    assert len(rows(out / "rows.jsonl")) == len(rows(out / "pairs.jsonl"))
    with refused("argument --out"):
        collect.main([str(kept), "--out", str(out)])
    config = tmp_path / "run.yaml"
    command = [sys.executable, "-m", "olora_ray", "init", str(out / "pairs.jsonl")]
    command += [str(versions.base), "--out", str(config), "--name", "morning"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "preference" in done.stdout
    (source,) = yaml.safe_load(config.read_text())["data"]["train"]
    assert source["path"] == str(out / "pairs.jsonl")


def test_thumbs_and_sides(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    for number in range(40):
        kept.answer(str(number), f"question {number}")
        kept.say(str(number), rating=1)
    kept.later(DAY)
    for number in range(40):
        kept.answer(f"more {number}", f"Question  {number}", "5")
        kept.say(f"more {number}", rating=-1)
    kept.answer("orphan")
    outs = []
    for day in ("2024-10-04", "2024-10-05"):
        outs.append(tmp_path / day)
        collect.main([str(kept.folder), "--out", str(outs[-1]), "--day", day])
    assert set(lines_of(outs[0])) == {"rows.jsonl", "held_out_rows.jsonl"}
    assert set(lines_of(outs[1])) == {"ratings.jsonl", "held_out_ratings.jsonl"}

    def questions(file: Path) -> set[str]:
        return {row["messages"][0]["content"].lower().replace("  ", " ") for row in rows(file)}

    held_out = questions(outs[0] / "held_out_rows.jsonl")
    assert held_out == questions(outs[1] / "held_out_ratings.jsonl")
    assert questions(outs[0] / "rows.jsonl") == questions(outs[1] / "ratings.jsonl")
    assert 0 < len(held_out) < 12
    collect.main([str(kept.folder), "--out", str(tmp_path / "none"), "--day", "2024-10-06"])
    assert not (tmp_path / "none").exists()
    for day in ("2024-13-01", f"{datetime.now(UTC).date()}"):
        with refused("argument --day"):
            collect.main([str(kept.folder), "--out", str(tmp_path / "none"), "--day", day])
