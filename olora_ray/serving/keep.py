"""Served chats as rows in a folder, and what people say about them, for `olora-ray follow --keep` and `--rows`.

    FOLDER/_2026-12-02.jsonl            rows of this day (UTC); sources skip a name that begins with _
    FOLDER/2026-12-01.jsonl             rows of a day that has ended: this file does not change any more
    FOLDER/_feedback-2026-12-02.jsonl   ratings and corrections, by the id of the answer

One thread writes, so that a slow or full disk delays no answer: what does not fit into its queue is left out and
counted. Answers that were not drawn stay in memory for a while, so that each answer that gets feedback has its row.
"""

import contextlib
import fcntl
import json
import logging
import os
import pkgutil
import queue
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import Counter

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config import command_line
from olora_ray.serving.watch import Attempts

# Bytes of the answers that wait for the writer, and of those that wait for feedback.
QUEUED = 64 * 2**20
REMEMBERED = 64 * 2**20
# Seconds after which the writer looks at the day and at the size of the folder.
LOOKS = 60.0
LOCK = "_lock"
NAME = re.compile(r"_?(feedback-)?(\d{4}-\d\d-\d\d)(-more)*\.jsonl")
COLUMN = "olora_ray"
"""The column of a row that says where it is from; a format reads no such column."""

Row = dict[str, Any]
logger = logging.getLogger(__name__)
KEPT = Counter("olora_follow_answers_kept", "Answers that are rows of --keep")
LEFT_OUT = Counter("olora_follow_answers_left_out", "Answers that --keep cannot keep", ["reason"])


class Told(NamedTuple):
    """An engine's answer to a chat, whole or streamed."""

    id: str
    text: str
    end: str
    """The reason why the first choice ended."""
    choices: int


def told(content: bytes) -> Told:
    parts = [line[5:] for line in content.splitlines() if line.startswith(b"data: {")] or [content]
    answers = [json.loads(part) for part in parts]
    choices = [choice for answer in answers for choice in answer["choices"]]
    first = [choice for choice in choices if choice["index"] == 0]
    texts = [(each.get("message") or each["delta"]).get("content") or "" for each in first]
    ends = [each["finish_reason"] for each in first if each.get("finish_reason")]
    number = len({choice["index"] for choice in choices})
    return Told(str(answers[0].get("id") or ""), "".join(texts), ends[-1], number)


def chat_row(body: Mapping[str, Any], answer: str) -> Row:
    row = {"messages": [*body["messages"], {"role": "assistant", "content": answer}]}
    if body.get("tools"):
        row["tools"] = body["tools"]
    return row


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row as one line, which only this user may read. If the disk gets full, nothing of it stays."""
    line = f"{json.dumps(row)}\n".encode()
    with _appending, open(path, "ab", buffering=0, opener=_private) as file:
        before = file.tell()
        try:
            written = file.write(line)
            # A disk without room for all of it takes a part, without an error. The second write has the error.
            if written < len(line):
                file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(before)
            error.filename = str(path)
            raise


_appending = threading.Lock()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


@dataclass(frozen=True)
class _Answered:
    """A chat that the engine has answered."""

    asked: bytes
    told: bytes
    version: str
    at: float

    @property
    def size(self) -> int:
        return len(self.asked) + len(self.told)


@dataclass(frozen=True)
class _Said:
    """Feedback on an answer; `done` gets the code of the response."""

    id: str
    about: Mapping[str, Any]
    done: Future[int] = field(default_factory=Future)


class Keeper:
    def __init__(self, options: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        """Raise UserError for a value that cannot be, and for a folder that cannot be written or is another's."""
        self._clock = clock
        self._share = _number(options, "--keep-share", 0.05)
        self._most = _number(options, "--keep-gb", 1.0) * 1e9
        self._days = _number(options, "--keep-days", 30.0)
        self._redact = _redaction(options.get("--redact"))
        self._folder = Path(command_line.absolute(options["--keep"], field="argument --keep"))
        with as_user_error(f"argument --keep: {self._folder}", OSError, reason=short_reason):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            others = [*self._folder.iterdir()]
            if others and not (self._folder / LOCK).exists():
                raise FileExistsError(
                    "has other files; name a new folder, as old files are deleted"
                )
            self._lock = open(self._folder / LOCK, "w", opener=_private)  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"argument --keep: {self._folder}: another `olora-ray follow` keeps its answers there;"
                " name another folder"
            ) from None
        self._queue = queue.SimpleQueue[_Answered | _Said | None]()
        self._counting = threading.Lock()
        self._waiting = 0
        self._day = ""
        self._looked = 0.0
        self._full = False
        self._written: dict[str, set[str]] = {}  # day -> ids of its rows
        # id -> bytes and row, which is not written yet
        self._recent = OrderedDict[str, tuple[int, Row]]()
        self._remembered = 0
        self._writing = Attempts("--keep", "--keep: answers are kept again")
        self._looking = Attempts("--keep")
        self._failures: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def answered(self, asked: bytes, content: bytes, version: str) -> None:
        """Take an answer, and return at once. `content` is empty if the answer was not whole."""
        answer = _Answered(asked, content, version, self._clock())
        with self._counting:
            room = self._waiting + answer.size <= QUEUED
            if room:
                self._waiting += answer.size
        if room:
            self._queue.put(answer)
        else:
            LEFT_OUT.labels("busy").inc()

    def said(self, id: str, about: Mapping[str, Any]) -> Future[int]:
        """Take feedback on an answer. The result is 204; 404 for an id that is not known; 503 if it is not written."""
        feedback = _Said(id, about)
        self._queue.put(feedback)
        return feedback.done

    def stop(self) -> None:
        """Write what waits, for at most ten seconds."""
        self._queue.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        with self._looking.attempt():
            self._read_ids()
        self._look()
        while True:
            try:
                job = self._queue.get(timeout=LOOKS)
            except queue.Empty:
                self._look()
                continue
            self._look()
            if job is None:
                return
            if isinstance(job, _Answered):
                with self._counting:
                    self._waiting -= job.size
                self._take(job)
            elif job.done.set_running_or_notify_cancel():
                job.done.set_result(self._feedback(job))

    def _take(self, job: _Answered) -> None:
        try:
            body = json.loads(job.asked)
            answer = told(job.told)
            row = chat_row(body, answer.text)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
            LEFT_OUT.labels("not_whole").inc()
            return
        if answer.end != "stop" or answer.choices != 1 or not answer.id or not answer.text.strip():
            LEFT_OUT.labels("not_whole").inc()
            return
        at = datetime.fromtimestamp(job.at, UTC).isoformat(timespec="seconds")
        row[COLUMN] = {"id": answer.id, "version": job.version, "time": at}
        if random.random() < self._share:
            self._write(row)
            return
        self._recent[answer.id] = (job.size, row)
        self._remembered += job.size
        while self._remembered > REMEMBERED:
            _, (size, _) = self._recent.popitem(last=False)
            self._remembered -= size

    def _feedback(self, job: _Said) -> int:
        if job.id in self._recent:
            size, row = self._recent[job.id]
            if not self._write(row):
                return 503
            del self._recent[job.id]
            self._remembered -= size
        elif not any(job.id in ids for ids in self._written.values()):
            return 404
        about = {**job.about, "id": job.id, "time": self._now().isoformat(timespec="seconds")}
        with self._writing.attempt():
            if "correction" in about:
                spoken = {"role": "assistant", "content": about["correction"]}
                clean = self._clean({"messages": [spoken]})
                if clean is None:
                    return 204  # the user's own function wants nothing of it on the disk
                about["correction"] = clean["messages"][-1]["content"]
            append(self._folder / f"_feedback-{self._day}.jsonl", about)
            return 204
        return 503

    def _write(self, row: Row) -> bool:
        if self._full:
            LEFT_OUT.labels("no_room").inc()
            return False
        with self._writing.attempt():
            clean = self._clean({name: value for name, value in row.items() if name != COLUMN})
            if clean is None:
                LEFT_OUT.labels("redacted").inc()
                return True
            append(self._folder / f"_{self._day}.jsonl", {**clean, COLUMN: row[COLUMN]})
            self._written.setdefault(self._day, set()).add(row[COLUMN]["id"])
            KEPT.inc()
            return True
        LEFT_OUT.labels("failed").inc()
        return False

    def _clean(self, row: Row) -> Row | None:
        if self._redact is None:
            return row
        try:
            return self._redact(row)
        except Exception as error:  # the user's code may raise anything
            # Its message may have parts of the row in it, so only its type is told.
            failure = type(error).__name__
            if failure not in self._failures:
                logger.error(f"--redact fails with {failure}; such rows are not kept")
            self._failures.add(failure)
            return None

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _look(self) -> None:
        """Close the files of days that have ended, and delete the oldest ones above the limits."""
        now = self._now()
        day = f"{now:%Y-%m-%d}"
        if day == self._day and abs(now.timestamp() - self._looked) < LOOKS:
            return
        self._day = day
        self._looked = now.timestamp()
        with self._looking.attempt():
            for file in files_of(self._folder):
                if file.name.startswith("_2") and day_of(file) != day:
                    _close(file)
            oldest = f"{now - timedelta(days=self._days):%Y-%m-%d}"
            files = sorted(files_of(self._folder), key=day_of)
            size = sum(file.stat().st_size for file in files)
            for file in files:
                if day_of(file) < oldest or (size > self._most and day_of(file) < day):
                    size -= file.stat().st_size
                    file.unlink()
                    self._written.pop(day_of(file), None)
            self._full = size > self._most

    def _read_ids(self) -> None:
        for file in files_of(self._folder):
            for line in lines(file):
                if line and COLUMN in line:
                    self._written.setdefault(day_of(file), set()).add(line[COLUMN]["id"])


def files_of(folder: Path) -> list[Path]:
    """Return the files of rows and of feedback, in the order of their names."""
    return sorted(file for file in folder.iterdir() if NAME.fullmatch(file.name))


def lines(file: Path) -> Iterator[Row | None]:
    """Yield the objects of a file; None for a line that is none: the end of a file that was cut by a power failure."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def day_of(file: Path) -> str:
    match = NAME.fullmatch(file.name)
    assert match
    return match[2]


def _close(file: Path) -> None:
    closed = file.with_name(file.name.removeprefix("_"))
    # A clock that was set back has opened the day again.
    while closed.exists():
        closed = closed.with_stem(f"{closed.stem}-more")
    file.rename(closed)


def _number(options: Mapping[str, str], name: str, default: float) -> float:
    with as_user_error(f"argument {name}", ValueError):
        number = float(options.get(name, default))
        if not 0 <= number < 1e6 or (name == "--keep-share" and number > 1):
            raise ValueError(f"{number:g} is out of its range")
    return number


def _redaction(name: str | None) -> Callable[[Row], Row | None] | None:
    if name is None:
        return None
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # the code of the user's module may raise anything
        raise UserError(f"argument --redact: {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"argument --redact: {name}: is no function; write MODULE:FUNCTION")
    return found  # type: ignore[no-any-return]
