"""Ten nights of a registered model, with real parts: deploy/night.py, Ray, an MLflow server, a receiver elsewhere.

    python -m tests.contrib.demos.nights

The receiver of notifications and pings runs in a network namespace of its own, behind a virtual cable. The storage is a
small disk in memory. Both need root. The model is tiny, so that a night takes less than a minute. After each night the
exit code, the decision, what the receiver heard and the champion are checked; then the table is printed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from olora_ray.tracking.aliases import Aliases
from tests.mlflow_server import Server
from tests.pipelines import project
from tests.recovery.processes import scratch
from tests.retrain import nightly
from tests.retrain.nightly import Nightly
from tests.waiting import until

BIN = Path(sys.executable).parent
HERE, THERE = "10.201.78.1", "10.201.78.2"
DISK = "256m"
ANSWERS = {
    word: 4 * str(number) for number, word in enumerate(["one", "two", "three", "four", "five"], 1)
}
OTHER = {"north": "6666", "south": "7777"}
"""Another task, of which the guard has rows, and the held-out rows have none."""
COLUMNS = {
    "night": 16,
    "what was done": 30,
    "code": 5,
    "what ended it": 44,
    "what the receiver heard": 52,
    "champion": 8,
}


@dataclass(frozen=True)
class Expected:
    """Regular expressions are searched in the texts."""

    codes: tuple[int, ...]
    ended: str
    """In the last line of the night that says how it ended."""
    heard: tuple[str, ...]
    """In each text that the receiver got, in this order, but for the pings of the start."""
    champion: str


class Demo:
    def __init__(self, folder: Path, server: Server, url: str, said: Path) -> None:
        """`said` is the file of what the receiver at `url` has heard."""
        self.server, self.said, self.table, self.wrong = server, said, [tuple(COLUMNS)], list[str]()
        model = project.make_model(folder / "model")
        write(folder / "guard.jsonl", OTHER, 24, marks="-")
        for name in ("hook", "ping"):
            (folder / name).write_text(url.replace("hook", name, 1))
        told = {
            "notify": {"url": f"file:{folder}/hook"},
            "retrain": {"ping": f"file:{folder}/ping"},
        }
        gate = {"guard": [{"path": str(folder / "guard.jsonl")}], "guard_margin": 0.5}
        self.project = Nightly(
            folder, model, tracking={"uri": server.uri}, gate=gate, train=longer(), **told
        )
        self.aliases = Aliases(server.uri, "nightly")
        self.data = self.project.data
        write(folder / "heldout.jsonl", ANSWERS, 100, marks="-")
        self.file("0-first", "one", "two")
        write(self.data / "0-other.jsonl", OTHER, 40)

    def file(self, name: str, *words: str, wrong: bool = False) -> Path:
        answers = {word: ANSWERS[word] for word in words}
        if wrong:
            answers = dict(
                zip(words, [*answers.values()][1:] + [*answers.values()][:1], strict=True)
            )
        return write(self.data / f"{name}.jsonl", answers, 120 if wrong else 40)

    def night(self, name: str, done: str, expected: Expected, drivers: int = 1) -> None:
        """Run one night as cron does, on as many machines at once as there are drivers, and check it."""
        before = len(self.said.read_text().splitlines())
        config = str(self.project.config)
        command = [
            sys.executable,
            "deploy/night.py",
            "--pause",
            "1",
            "--tries",
            "2" if drivers == 1 else "1",
            config,
        ]
        command += ["--", str(BIN / "olora-ray"), "retrain", config]
        began, out = time.monotonic(), subprocess.PIPE
        running = [
            subprocess.Popen(
                command,
                cwd=project.ROOT,
                env=self.project.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(drivers)
        ]
        logs = [each.communicate(timeout=900)[0] for each in running]
        codes = tuple(each.returncode for each in running)
        said = [json.loads(line) for line in self.said.read_text().splitlines()[before:]]
        heard = [text_of(*each) for each in said if not each[0].endswith("/start")]
        champion = self.champion()
        ended = ended_by(logs)
        self.table.append(
            (name, done, ", ".join(map(str, codes)), ended, "\n".join(heard), champion)
        )
        print(
            f"{name}: exit code {self.table[-1][2]} after {time.monotonic() - began:.0f} s",
            flush=True,
        )
        fits = len(heard) == len(expected.heard) and all(map(re.search, expected.heard, heard))
        found = (codes, bool(re.search(expected.ended, ended)), fits, champion)
        if found != (expected.codes, True, True, expected.champion):
            print(
                "\n".join([*logs, *heard]),
                f"FAILED: {name}: found {found}, expected {expected}",
                sep="\n",
            )
            self.wrong.append(name)

    def champion(self) -> str:
        """Return the number of the champion; MLflow's server may be away."""
        return self.aliases.current().get("champion", "none") if self.server.answers() else "?"


def text_of(path: str, text: str) -> str:
    """Return the text of a notification, or a ping and its text."""
    if path.startswith("/hook/"):
        return str(json.loads(text)["text"])
    ping = "ping /fail" if path.endswith("/fail") else "ping"
    return f"{ping}: {text.splitlines()[0]}" if text else ping


def ended_by(logs: Sequence[str]) -> str:
    """Return the line of each driver's log that says how its night ended."""
    lines = [[line for line in log.splitlines() if re.search(ENDS, line)] for log in logs]
    return "\n".join(
        re.sub(r"^\d\d:\d\d:\d\d ", "", found[-1]) if found else "?" for found in lines
    )


ENDS = r"^error: |nothing changed|: passed|: refused|passed: |refused: |SKIPPED|NOT FINISHED"
OVERLAP = r"^ping: the retraining of nightly is already running \(process \d+ on "


def play(demo: Demo, fill: Callable[[], object], make_room: Callable[[], object]) -> None:
    """Play the nights."""
    data, client = demo.data, demo.aliases.client
    quiet = r"^ping: .*(nothing changed|version \d (promoted|refused|moved): ).* \(exit code 0\)$"
    demo.night(
        "0 the first",
        "rows of two words and of another task",
        Expected((0,), "passed: eval/loss", ("version 1 promoted: eval/loss", quiet), "1"),
    )
    three = demo.file("1-three", "three")
    demo.night(
        "1 better data",
        "a file with a third word arrives",
        Expected((0,), "passed: eval/loss", ("version 2 promoted: eval/loss", quiet), "2"),
    )
    demo.night(
        "2 the same data", "-", Expected((0,), "nothing changed since version 2", (quiet,), "2")
    )
    poison = demo.file("3-poison", "one", "two", "three", wrong=True)
    demo.night(
        "3 poisoned rows",
        "a file with wrong answers arrives",
        Expected((0,), "refused: eval/loss", ("version 3 refused: eval/loss", quiet), "2"),
    )
    poison.unlink()
    four, other = demo.file("4-four", "four"), data / "0-other.jsonl"
    aside = other.rename(data.parent / "other")
    demo.night(
        "4 a model that forgets",
        "a fourth word arrives; the rows of the other task are gone",
        Expected(
            (0,), "refused: guard: eval/loss", ("version 4 refused: guard: eval/loss", quiet), "2"
        ),
    )
    aside.rename(other)
    four.unlink()
    client.delete_model_version("nightly", "2")
    demo.night(
        "5 deleted champion",
        "version 2 is deleted in MLflow",
        Expected(
            (0,),
            "passed: eval/loss",
            ("the champion is version 1", "version 5 promoted", quiet),
            "5",
        ),
    )
    demo.server.kill()
    demo.night(
        "6 MLflow away",
        "MLflow's server is killed",
        Expected(
            (75,),
            "NOT FINISHED: .*no MLflow server",
            ("not finished: .*no MLflow server", "/fail: .*no ML"),
            "?",
        ),
    )
    demo.server.start()
    demo.server.wait()
    demo.file("4-four", "four")
    fill()
    demo.night(
        "7 full disk",
        "the fourth word arrives; the disk of run.storage is full",
        Expected(
            (2,),
            "make room",
            ("failed: .*No space left on device; make room", "/fail: .*make room"),
            "5",
        ),
    )
    make_room()
    demo.night(
        "7 again",
        "room is made, the same command",
        Expected((0,), "passed: eval/loss", ("version 6 promoted: eval/loss", quiet), "6"),
    )
    whole = three.read_text()
    three.write_text(whole[: len(whole) // 2 + 9])  # all rows are as long as each other
    demo.night(
        "8 half-written file",
        "a copy of 1-three.jsonl stops half way",
        Expected((2,), "1-three.jsonl", ("failed: .*1-three.jsonl", "/fail: .*1-three.jsonl"), "6"),
    )
    three.write_text(whole)
    words = [
        str(BIN / "olora-ray"),
        "registry",
        "rollback",
        "nightly",
        "--tracking-uri",
        demo.server.uri,
    ]
    subprocess.run(
        words, cwd=project.ROOT, env=demo.project.environment(), check=True, capture_output=True
    )
    demo.night(
        "9 rollback by hand",
        "olora-ray registry rollback",
        Expected(
            (0,), "nothing changed since version 6", ("version 5 moved: .* by hand", quiet), "5"
        ),
    )
    demo.file("5-five", "five")
    demo.night(
        "10 two drivers",
        "a fifth word arrives; two machines start the night",
        Expected((0, 0), "SKIPPED", (OVERLAP, "version 7 promoted", quiet), "7"),
        drivers=2,
    )


def longer() -> dict[str, object]:
    train = project.settings(Path("-"), Path("-"))["train"]
    steps = {"steps": 80, "eval_every": 80, "checkpoint_every": 40, "log_every": 40}
    return {**train, **steps, "lr": 2e-2, "global_batch": 4}


def write(file: Path, answers: dict[str, str], rows: int, marks: str = nightly.MARKS) -> Path:
    words = [[*answers][number % len(answers)] for number in range(rows)]
    asked = [
        f"{marks[number // len(answers) % len(marks)]}{word}" for number, word in enumerate(words)
    ]
    nightly.write(
        file, [(question, answers[word]) for question, word in zip(asked, words, strict=True)]
    )
    return file


def printed(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table whose cells are wrapped."""
    for number, row in enumerate(table):
        cells = [
            [
                part
                for line in cell.splitlines() or [""]
                for part in textwrap.wrap(line, width, subsequent_indent="  ")
            ]
            for cell, width in zip(row, COLUMNS.values(), strict=True)
        ]
        for line in range(max(map(len, cells))):
            parts = [cell[line] if line < len(cell) else "" for cell in cells]
            yield " | ".join(
                f"{part:<{width}}" for part, width in zip(parts, COLUMNS.values(), strict=True)
            ).rstrip()
        yield (
            "-+-".join("-" * width for width in COLUMNS.values()) if number < len(table) - 1 else ""
        )


def root(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def elsewhere(folder: Path) -> Iterator[tuple[str, Path]]:
    """Run a receiver in another network namespace; yield its address and the file of what it has heard."""
    name = f"olr{os.getpid()}"
    said = folder / "heard.jsonl"
    root("ip", "netns", "add", name)
    try:
        root("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        root("ip", "addr", "add", f"{HERE}/30", "dev", name)
        root("ip", "link", "set", name, "up")
        root("ip", "-n", name, "addr", "add", f"{THERE}/30", "dev", "eth0")
        root("ip", "-n", name, "link", "set", "eth0", "up")
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "tests.receiver", THERE]
        with (
            said.open("w") as out,
            subprocess.Popen(command, cwd=project.ROOT, stdout=out) as process,
        ):
            try:
                until(lambda: said.read_text().endswith("\n"))
                yield said.read_text().strip(), said
            finally:
                process.kill()
    finally:
        root("ip", "netns", "del", name)  # and with it the cable


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """Mount a small disk; yield a function that fills it, and one that makes room again."""
    folder.mkdir()
    root("mount", "-t", "tmpfs", "-o", f"size={DISK}", "olora-nights", str(folder))
    ballast = folder / "ballast"

    def fill() -> None:
        free = os.statvfs(folder)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)

    try:
        yield fill, ballast.unlink
    finally:
        root("umount", "--lazy", str(folder))


def main() -> None:
    if os.geteuid():
        sys.exit(
            "make nights-demo needs root, for a network namespace and a small disk: sudo make nights-demo"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with scratch() as folder, small_disk(folder / "runs") as disk, elsewhere(folder) as (url, said):
        server = Server(folder / "mlflow")
        server.wait()
        demo = Demo(folder, server, url, said)
        try:
            play(demo, *disk)
        finally:
            server.kill()
            print("\n".join(["", *printed(demo.table)]))
    if demo.wrong:
        sys.exit(f"FAILED: {', '.join(demo.wrong)}")
    print(f"ten nights ended as they must, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
