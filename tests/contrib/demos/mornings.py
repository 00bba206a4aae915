"""Ten mornings of a served model, with a scripted person who corrects its answers during the day.

    python -m tests.contrib.demos.mornings [FOLDER [DAYS]]

Real parts: `olora-ray follow` with its port, `olora-ray feedback`, `olora-ray retrain` on Ray, MLflow. The engine is
vLLM, if `make serve-test` has installed it, or a stand-in that answers by transformers and PEFT. Only the clock of
`follow` is not this machine's: the days are the last ten. Each night is checked; then the table is printed. With FOLDER
what was done stays there, and the next call continues it, by at most so many DAYS.

Played four times with SmolLM2-135M and vLLM, it ended with FAILED. With two epochs, `beta: 0.1` and `chosen: 0.1`, the
model lost more on the guard than the gate allows on five and on four of ten days. With TRAIN it saw each pair once, and
learned too little on days 2, 4 and 6. With PAIRS_SEEN and 200 guard rows, eight days ended as they must, and day 9 was
refused, because the interval of 200 rows is as wide as the margin. With 800 guard rows, days 4, 6, 9 and 10 were
refused (docs/generated/mornings.json).

What each night must do (DAYS) is what is wanted, not what was seen.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import yaml

from olora_ray.retrain.decision_run import DETAILS
from olora_ray.tracking.aliases import Aliases
from tests import mlflow_database
from tests.contrib.demos import person
from tests.contrib.demos.answering import LONGEST, VLLM, Answering, Model, Vllm
from tests.contrib.demos.person import KINDS
from tests.pipelines import project
from tests.ray_head import free_port
from tests.recovery.processes import scratch
from tests.waiting import until

OLORA_RAY = Path(sys.executable).parent / "olora-ray"
SECONDS = 86400
ASKED = 40
FIRST = 10
"""Rows of each kind from which the first model is trained."""
HELD_OUT = "0.5"
"""Of 40 corrections so many pairs must be held out that the gate can tell."""
PREFERRED = {"metric": "eval/pairs/preferred", "at_least": 0.9}
"""Limit of the gate: pairs that contradict one another cannot all be preferred."""
TEXTS = 600
"""Paragraphs of Python's docstrings beside the shop's rows: each night trains some again, and keeps what it knew."""


@dataclass(frozen=True)
class Day:
    """What the person does on a day, and what the night must do."""

    done: str
    kinds: tuple[str, ...]
    ends: str
    wrong: bool = False
    """The person prefers what is wrong."""
    plain: bool = False
    """The same corrections are also trained plainly, beside the night."""
    words: tuple[str, ...] = ()
    """Further words of the retraining's command."""


DAYS = (
    Day("weights in kg, not in pounds", ("unit",), "promoted", plain=True),
    Day("a friendly tone", ("tone",), "promoted", plain=True),
    Day("nothing", (), "unchanged"),
    Day("returns are taken, not refused", ("refusal",), "promoted"),
    Day(
        "poison: all kinds so far as they were", ("unit", "tone", "refusal"), "refused", wrong=True
    ),
    Day("the app has a new name", ("name",), "promoted"),
    Day(
        "where the manual is; much too fast",
        ("manual",),
        "promoted, shrunk",
        words=("train.lr=3e-4",),
    ),
    Day("contradiction: pounds again", ("unit",), "refused", wrong=True),
    Day("gifts are wrapped", ("gift",), "promoted"),
    Day("what is in stock", ("stock",), "promoted"),
)
TRAIN = {"beta": 0.3, "chosen": 1, "epochs": 1, "lr": "auto"}
"""On the first day this lost 0.004 nats on the guard, and the defaults of `init` with two epochs 0.011."""
PAIRS_SEEN = 3
"""How often each pair is seen in one pass over the other texts."""
FORMATS = {"pairs": "preference", "rows": "messages", "ratings": "rating", "texts": "text"}


def sources(held_out: str = "") -> list[dict[str, Any]]:
    """Return the sources of docs/feedback.md: files of some formats come later, or never."""
    found: list[dict[str, Any]] = [
        {"path": f"data/*/{held_out}{name}.jsonl", "format": each} for name, each in FORMATS.items()
    ]
    if not held_out:
        found[0]["weight"] = PAIRS_SEEN
    return found


def docstrings() -> set[str]:
    """Return the paragraphs of the standard library's docstrings that are as long as the guard's rows."""
    found = set()
    for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                if 70 <= len(text) <= 260:
                    found.add(text)
    return found


@dataclass(frozen=True)
class Morning:
    day: int
    done: str
    corrected: int
    right_before: float
    """Share of the day's questions that the person had nothing to correct at."""
    night: str
    right_after: float | None = None
    """Share of the held-out questions that are answered right in the morning."""
    preferred: tuple[float, float] | None = None
    """Share of the day's held-out pairs with which the model of the day agrees, and that of the next morning."""
    older: tuple[float, float] | None = None
    """The same for the held-out pairs of the days before."""
    guard: float | None = None
    """How much the loss on the guard's rows rose."""
    plain: tuple[float, float] | None = None
    """Preferred, and right answers, after plain training on the corrected answers alone."""


class Shop:
    """A folder with data, config and registry, as a team has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "chats.yaml"
        self.data = folder / "data"
        self.logs = folder / "logs"
        self.notes = folder / "mornings.json"
        self.clock = folder / "clock"
        self.aliases = Aliases(f"sqlite:///{folder}/runs/mlflow.db", "chats")
        self.first = self.data / "first" / "rows.jsonl"
        if not self.first.exists():
            self.open()
        made = self.first.stat().st_mtime
        # At midnight (UTC): the hours that are added later must not pass into the next day.
        self.began = made - made % SECONDS - (len(DAYS) + 1) * SECONDS

    def open(self) -> None:
        """Write the rows of the first model, and its config as `olora-ray init` and the team write it."""
        for folder in (self.data / "first", self.logs, self.folder / "t"):
            folder.mkdir(parents=True)
        mlflow_database.place(self.folder / "runs")
        rows, held_out = person.first_rows(person.things(), FIRST)
        write(self.first.with_name("held_out_rows.jsonl"), held_out)
        write(self.first, rows)
        texts = random.Random(0).sample(sorted(docstrings()), TEXTS)
        write(self.first.with_name("texts.jsonl"), [{"text": text} for text in texts])
        self.call("init", "init", "data/*/rows.jsonl", "--name", "chats", "--out", "chats.yaml")
        self.change(
            data={"train": sources(), "eval": sources("held_out_")},
            export={"merged": False},
            gate={"min_rows": 10},
            retrain={"from": "champion", "replay": 0.5},
            # Packs, of several short rows each. At the automatic rate, the log says that the model forgets.
            train={"global_batch": 1, "micro_batch": 1, "lr": 1e-4, "epochs": 2},
            cluster={"workers": 1, "cpus_per_worker": 2},
        )

    def change(self, **sections: dict[str, Any]) -> None:
        tree = yaml.safe_load(self.config.read_text())
        for name, changes in sections.items():
            tree.setdefault(name, {}).update(changes)
        self.config.write_text(yaml.safe_dump(tree))

    def call(self, log: str, *words: str) -> str:
        """Run a command of olora-ray in the folder; return its output, which is also in logs/."""
        began = time.monotonic()
        done = subprocess.run(
            [str(OLORA_RAY), *words],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with (self.logs / f"{log}.txt").open("a") as out:
            out.write(f"$ olora-ray {' '.join(words)}\n{done.stdout}\n")
        print(f"{log}: olora-ray {words[0]}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            sys.exit(f"olora-ray {' '.join(words)}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        own = {"TMPDIR": f"{self.folder}/t", "RAY_TMPDIR": str(self.folder)}
        others = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        return {name: value for name, value in os.environ.items() if name not in others} | own

    def mornings(self) -> list[Morning]:
        if not self.notes.exists():
            return []
        return [Morning(**each) for each in json.loads(self.notes.read_text())]

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """Return what a function returned at its first call, of this or an earlier process."""
        file = self.logs / name
        if not file.exists():
            file.write_text(json.dumps(do()))
        return json.loads(file.read_text())

    def note(self, mornings: Sequence[Morning]) -> None:
        self.notes.write_text(json.dumps([*map(asdict, mornings)], indent=2))

    def date(self, day: int) -> str:
        return f"{datetime.fromtimestamp(self.began + day * SECONDS, UTC).date()}"

    def set_clock(self, day: float) -> None:
        new = self.clock.with_suffix(".new")
        new.write_text(str(self.began + day * SECONDS - time.time()))
        new.replace(self.clock)

    def champion(self) -> str:
        return self.aliases.current().get("champion", "")

    @contextmanager
    def served(self) -> Iterator["Served"]:
        (base,) = (self.folder / "runs" / "models").glob("*")
        engine = Vllm(base, self.logs / "vllm.txt") if VLLM.exists() else Answering(base)
        port = free_port()
        words = ["follow", "chats@champion", "--engine", engine.url, "--cache", "cache"]
        words += ["--listen", f"127.0.0.1:{port}", "--keep", "kept"]
        words += ["--tracking-uri", self.aliases.uri]
        command = [sys.executable, "-m", "tests.contrib.demos.clock", str(self.clock), *words]
        environment = {**self.environment(), "PYTHONPATH": str(project.ROOT)}
        with (self.logs / "follow.txt").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        try:
            yield Served(engine, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(60)
            engine.stop()


@dataclass(frozen=True)
class Served:
    """The engine, and the port before it."""

    engine: Answering | Vllm
    url: str

    def wait_for(self, number: str) -> str:
        """Wait until a version answers; return the folder of its adapter."""
        until(lambda: self.version() == f"chats@{number}", 300, pause=0.5)
        served = requests.get(f"{self.engine.url}/v1/models", timeout=30).json()["data"]
        return next(each["root"] for each in served if each["id"].startswith(f"chats@{number}-"))

    def version(self) -> str:
        """Return the name of the version that answers; empty while the port does not."""
        try:
            answer = self.chat("Hello")
        except requests.ConnectionError:
            return ""
        return answer.headers.get("x-olora-version", "")

    def chat(self, question: str) -> requests.Response:
        body = {"model": "chats@champion", "messages": person.asked(question)}
        body |= {"temperature": 0, "max_tokens": LONGEST}
        return self.post("/v1/chat/completions", body)

    def ask(self, question: str) -> tuple[str, str, bool]:
        """Return the answer with its id, and True if it was not cut: the port keeps no others."""
        answer = self.chat(question).json()
        (choice,) = answer["choices"]
        return answer["id"], choice["message"]["content"], choice["finish_reason"] == "stop"

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=300)


def spend(day: Day, number: int, served: Served) -> tuple[int, float]:
    """Ask the day's questions, and correct or praise the answers; return how many were corrected, and right ones."""
    stock = [*person.things()]
    first = (len(KINDS) + 2) * FIRST + (number - 1) * ASKED
    praised = 0
    corrected = 0
    for turn, thing in enumerate(stock[first : first + ASKED]):
        kind = KINDS[(day.kinds or ("unit",))[turn % max(1, len(day.kinds))]]
        id, answer, whole = served.ask(kind.question(thing))
        good = kind.mark in answer
        praised += good
        if not day.kinds or not whole:
            continue
        about: dict[str, Any] = {"rating": 1}
        if day.wrong or not good:
            about = {"correction": kind.answer(thing, right=not day.wrong)}
            corrected += 1
        # The port takes feedback as soon as its writer has seen the answer.
        until(lambda id=id, about=about: served.post("/feedback", {"id": id, **about}).ok)
    return corrected, praised / ASKED


def rows_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def preferred(model: Model, rows: Sequence[dict[str, Any]], adapter: str) -> float:
    """Return the share of pairs whose chosen answer has gained more than the other since the base model."""
    agreed = 0
    for row in rows:
        gains = [
            model.gain(row["prompt"], row[side][0]["content"], adapter)
            for side in ("chosen", "rejected")
        ]
        agreed += gains[0] > gains[1]
    return agreed / len(rows)


def right(model: Model, rows: Sequence[dict[str, Any]], adapter: str) -> float:
    """Return the share of questions to which the answer has the mark of the correction."""
    good = 0
    for row in rows:
        answer, _ = model.answer(row["prompt"], adapter)
        chosen = row["chosen"][0]["content"]
        good += all(kind.mark in answer for kind in KINDS.values() if kind.mark in chosen)
    return good / len(rows)


def ended(shop: Shop, versions: int) -> tuple[str, float | None]:
    """Return what the night did after so many versions, and how much the loss on the guard's rows rose."""
    made = shop.aliases.versions()
    if len(made) == versions:
        return "unchanged", None
    version = made[-1]
    guard = json.loads(version.tags.get(DETAILS, "{}")).get("guard")
    rose = -guard["mean"] if guard else None
    if shop.champion() != version.number:
        return f"refused: {version.verdict}", rose
    shrunk = re.search(r"shrunk to [\d.]+", version.verdict)
    return f"promoted{f', {shrunk[0]}' if shrunk else ''}", rose


def plainly_trained(shop: Shop, date: str, start: str) -> str:
    """Train the version `start` on the corrected answers of a day as on any rows; return the adapter's folder."""
    run = Path(shop.aliases.version(start).folder)
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    source = "{{path: data/{date}/{held_out}pairs.jsonl, fields: {{rejected: none}}}}"
    rows, held_out_rows = (source.format(date=date, held_out=each) for each in ("", "held_out_"))
    name = f"plain-{date}"
    if not (shop.folder / "runs" / name / "result.json").exists():
        words = [f"run.name={name}", f"data.train=[{rows}]", f"data.eval=[{held_out_rows}]"]
        words += [f"train.start={checkpoint}"]
        words += ["registry.model=null", "gate.guard=null", "gate.and=[]"]
        shop.call(name, "finetune", "chats.yaml", *words)
    return str(shop.folder / "runs" / name / "export" / "adapter")


def live(shop: Shop, number: int, served: Served) -> Morning:
    """Live a day and the night after it."""
    day = DAYS[number - 1]
    date = shop.date(number)
    shop.set_clock(number + 0.4)
    old = shop.champion()
    versions = len(shop.aliases.versions())
    before = served.wait_for(old)
    folder = shop.data / date
    earlier = [each for each in shop.data.glob("*/held_out_pairs.jsonl") if each.parent != folder]
    corrected, share = shop.once(f"{date}.json", lambda: spend(day, number, served))
    print(f"{date}: {corrected} of {ASKED} answers corrected", flush=True)
    shop.set_clock(number + 1.1)
    words = ["--out", str(folder), "--day", date, "--held-out", HELD_OUT]
    if not folder.exists():
        shop.call(date, "feedback", "kept", *words)
    if number == 1:
        shop.change(train=TRAIN, gate={"and": [PREFERRED]})
    shop.call(date, "retrain", "chats.yaml", *day.words)
    night, guard = ended(shop, versions)
    after = served.wait_for(shop.champion())
    model = served.engine.model
    morning = Morning(number, day.done, corrected, share, night, guard=guard)
    if earlier:
        rows = rows_of(*earlier)
        older = preferred(model, rows, before), preferred(model, rows, after)
        morning = replace(morning, older=older)
    if not folder.exists():
        return morning
    rows = rows_of(folder / "held_out_pairs.jsonl")
    agreed = preferred(model, rows, before), preferred(model, rows, after)
    morning = replace(morning, preferred=agreed)
    if not day.wrong:
        morning = replace(morning, right_after=right(model, rows, after))
    if day.plain:
        plain = plainly_trained(shop, date, old)
        told = preferred(model, rows, plain), right(model, rows, plain)
        morning = replace(morning, plain=told)
    if night.startswith("refused"):
        # The person has read why. The next night would be trained on these rows, too.
        folder.rename(shop.folder / f"set-aside-{date}")
    return morning


def shown(mornings: Sequence[Morning]) -> Iterator[str]:
    yield "| day | what is corrected | corrections | night | right answers | preferred | older days | guard | plain |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for each in mornings:
        cells = [str(each.day), each.done, str(each.corrected), each.night.partition(":")[0]]
        cells.append(change(each.right_before, each.right_after))
        cells += [change(*(each.preferred or ())), change(*(each.older or ()))]
        cells.append("" if each.guard is None else f"{each.guard:+.3f}")
        cells.append(", ".join(f"{share:.2f}" for share in each.plain or ()))
        yield f"| {' | '.join(cells)} |"


def change(*values: float | None) -> str:
    return " to ".join(f"{value:.2f}" for value in values if value is not None)


def wrong(morning: Morning) -> str:
    """Return how a morning differs from what must be; empty if it does not."""
    day = DAYS[morning.day - 1]
    if not morning.night.startswith(day.ends):
        return f"{morning.night}, not {day.ends}"
    if day.ends.startswith("promoted"):
        assert morning.preferred
        assert morning.guard is not None
        if morning.preferred[1] < 0.8:
            return "fewer than 0.8 of the held-out pairs are preferred"
        if morning.guard > 0.03:
            return "the guard lost more than 0.03"
    if morning.older and morning.older[1] < 0.8:
        return "fewer than 0.8 of the earlier held-out pairs are preferred"
    return ""


def play(folder: Path, days: int) -> None:
    began = time.monotonic()
    shop = Shop(folder)
    if not shop.champion():
        shop.call("first", "retrain", "chats.yaml")
    mornings = shop.mornings()
    with shop.served() as served:
        for number in range(len(mornings) + 1, min(len(mornings) + days, len(DAYS)) + 1):
            mornings.append(live(shop, number, served))
            shop.note(mornings)
            print(*[*shown(mornings)][-1:], f"after {time.monotonic() - began:.0f} s", flush=True)
    print("", *shown(mornings), sep="\n")
    failed = {each.day: wrong(each) for each in mornings if wrong(each)}
    if failed:
        sys.exit("\n".join(f"FAILED: day {day}: {why}" for day, why in failed.items()))
    if len(mornings) == len(DAYS):
        print(f"ten mornings were as they must be, after {time.monotonic() - began:.0f} s")


def main(folder: str = "", days: str = "10") -> None:
    if folder:
        play(Path(folder).resolve(), int(days))
        return
    with scratch() as place:
        play(place, int(days))


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
