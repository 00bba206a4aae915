"""Make training data of the feedback that `olora-ray follow --keep` has kept.

    olora-ray feedback FOLDER --out FOLDER [--day 2026-12-02] [--held-out 0.1]
        [--rows]

FOLDER       the folder of --keep
--out        a new folder for the files below; it is refused if it exists
--day        only feedback of this day (UTC), which has ended; default: feedback
             of all days
--held-out   share of the questions whose feedback goes into files held_out_...;
             default: 0.1
--rows       also write each correction as a row

pairs.jsonl    a correction is preferred to the model's answer
ratings.jsonl  answers with a thumb up or down
rows.jsonl     answers with a thumb up, if there is no thumb down; corrections
               with --rows

Each file has one format, so each is a source of its own (data.train). Of
several corrections of an answer the last one counts, and a correction counts
more than a thumb. A digest of the first question of a chat decides on which
side it is, so the same question is on the same side on all days. A file without
rows is not written; without any feedback nothing is written.

Exit codes: 0 done; 2 an error that you can fix.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import aligned
from olora_ray.config import command_line
from olora_ray.serving.keep import COLUMN, Row, day_of, files_of, lines

HEADS = ("version", "pairs", "thumbs up", "thumbs down", "rows", "held out")


@dataclass(frozen=True)
class Judged:
    """A kept answer, and what was said about it last."""

    row: Row
    about: Row

    @property
    def version(self) -> str:
        return str(self.row[COLUMN]["version"])

    @property
    def answer(self) -> Any:
        return self.row["messages"][-1]["content"]

    @property
    def question(self) -> str:
        """The first question of the chat: later ones have its answers before them."""
        turns = [turn for turn in self.row["messages"] if turn["role"] == "user"]
        text = turns[0]["content"] if turns else self.row["messages"][:-1]
        return " ".join(json.dumps(text).lower().split())

    def is_held_out(self, share: float) -> bool:
        return int(storage.digest(self.question)[:8], 16) < share * 2**32

    def corrected(self) -> tuple[Row, Row]:
        """Return a correction as a pair and as a row."""
        *prompt, answer = self.row["messages"]
        correction = {"role": "assistant", "content": self.about["correction"]}
        row = {**self.row, "messages": [*prompt, correction]}
        pair = {**self.row, "prompt": prompt, "chosen": [correction], "rejected": [answer]}
        del pair["messages"]
        return pair, row


def main(argv: list[str]) -> None:
    options = ("--out", "--day", "--held-out")
    parsed = command_line.parse(argv or ["--help"], __doc__ or "", ["--rows"], options)
    if len(parsed.words) != 1 or "--out" not in parsed.options:
        raise UserError("usage: olora-ray feedback FOLDER --out FOLDER; see --help")
    share = 0.1
    with as_user_error("argument --held-out: expected a share from 0 to below 1", ValueError):
        share = float(parsed.options.get("--held-out", share))
        if not 0 <= share < 1:
            raise ValueError(f"{share:g} is none")
    out = Path(command_line.absolute(parsed.options["--out"], field="argument --out"))
    if out.exists():
        raise UserError(f"argument --out: {out}: exists already; name a new folder")
    day = parsed.options.get("--day")
    if day is not None:
        with as_user_error("argument --day: expected a day such as 2026-12-02", ValueError):
            day = f"{date.fromisoformat(day)}"
        today = f"{datetime.now(UTC).date()}"
        if day >= today:
            # The rest of the day would be lost, because the next call is for another day.
            raise UserError(
                f"argument --day: {day} has not ended, as it is {today} (UTC); name an earlier day, or leave"
                " it out to use all feedback"
            )
    folder = Path(command_line.absolute(parsed.words[0]))
    left_out: Counter[str] = Counter()
    with as_user_error(f"{folder}", OSError, reason=short_reason):
        judged = [*_judged(folder, day, left_out)]
    files, table = _sorted(judged, share, "--rows" in parsed.flags)
    if files:
        with as_user_error(f"argument --out: {out}", OSError, reason=short_reason):
            _write(out, files)
        print(*aligned(table, [False, *[True] * 5]), sep="\n")
        print(f"\nwritten: {', '.join(sorted(files))} in {out}")
    else:
        print("no feedback to train on; nothing is written")
    for reason, number in left_out.items():
        print(f"left out: {number} {reason}")


def _judged(folder: Path, day: str | None, left_out: Counter[str]) -> Iterator[Judged]:
    """Yield each answer with feedback once, in the order of its last feedback."""
    files = files_of(folder)
    said: dict[str, Row] = {}
    for file in files:
        if "feedback-" not in file.name or day not in (None, day_of(file)):
            continue
        for about in lines(file):
            if about is None:
                left_out["broken lines of feedback"] += 1
                continue
            before = said.pop(about["id"], None)
            if before:
                left_out["of several about one answer"] += 1
                if "correction" in before and "correction" not in about:
                    about = before
            said[about["id"]] = about
    rows: dict[str, Row] = {}
    for file in files:
        if "feedback-" in file.name:
            continue
        for row in lines(file):
            if row and row[COLUMN]["id"] in said:
                rows[row[COLUMN]["id"]] = row
    found: dict[str, Judged] = {}
    for id, about in said.items():
        if id not in rows:
            left_out["about an answer that is not in the folder any more"] += 1
            continue
        each = Judged(rows[id], about)
        if about.get("correction") == each.answer:
            left_out["corrections that change nothing"] += 1
            continue
        # The same question with the same answer: what was said last counts.
        key = storage.digest_json([each.row["messages"], each.row.get("tools")])
        if found.pop(key, None):
            left_out["with the same question and answer as a later one"] += 1
        found[key] = each
    yield from found.values()


def _sorted(
    judged: list[Judged], share: float, with_rows: bool
) -> tuple[dict[str, list[Row]], list[list[str]]]:
    """Return the rows of each file, and the table of what became of each version's answers."""
    thumbs_down = any(each.about.get("rating") == -1 for each in judged)
    files: dict[str, list[Row]] = defaultdict(list)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for each in judged:
        rows = {}
        number = counts[each.version]
        if "correction" in each.about:
            rows["pairs"], row = each.corrected()
            if with_rows:
                rows["rows"] = row
        else:
            up = each.about["rating"] == 1
            number["thumbs up" if up else "thumbs down"] += 1
            if thumbs_down:
                rows["ratings"] = {**each.row, "label": up}
            else:
                rows["rows"] = each.row
        number.update(rows.keys())
        held_out = each.is_held_out(share)
        number["held out"] += held_out
        for name, row in rows.items():
            files[f"held_out_{name}.jsonl" if held_out else f"{name}.jsonl"].append(row)
    table = [list(HEADS)]
    for version, number in sorted(counts.items()):
        table.append([version, *[str(number[head]) for head in HEADS[1:]]])
    return files, table


def _write(out: Path, files: dict[str, list[Row]]) -> None:
    with storage.staged(out) as partial:
        partial.mkdir(mode=0o700)
        for name, rows in files.items():
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            storage.write_text(str(partial / name), text)
