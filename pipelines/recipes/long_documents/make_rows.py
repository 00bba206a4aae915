"""Write the rows of the recipe: minutes of meetings of about a thousand tokens, and questions to them.

    python pipelines/recipes/long_documents/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. Held-out minutes have other people and subjects. In
half of the subjects another person was named first, so the answer is not just the nearest name.
"""

import json
import random
import re
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("minutes.yaml").read_text(encoding="utf-8"))
MONTHS = ("January", "March", "May", "June", "August", "October", "November")
SUBJECTS = 10
ROWS = {"train": 80, "heldout": 50}
QUESTIONS = {"train": 5, "heldout": 1}
"""Questions of a row: several train as much as rows of their own, and the minutes are read once."""
PERSON_AND_DAY = re.compile(r"(?!So )(\b[A-Z]\w+ [A-Z]\w+)[^.]*? by (\d+ \w+)")


def subject(topic: str, split: str, rng: random.Random) -> tuple[str, str]:
    """Return what the minutes say of a topic, and the answer."""
    name, other = (" ".join(map(rng.choice, WORDS["names"][split])) for _ in range(2))
    sooner, date = (f"{rng.randint(1, 28)} {rng.choice(MONTHS)}" for _ in range(2))
    told = rng.sample(WORDS["reports"], rng.randint(1, 3))
    told += rng.choice(([], [rng.choice(WORDS["before"])]))
    told.append(rng.choice(WORDS["decided"]))
    if rng.random() < 0.5:
        told.append(rng.choice(WORDS["reports"]))
    return " ".join(told).format(
        name=name, other=other, sooner=sooner, date=date
    ), f"{name}, {date}"


def row(split: str, rng: random.Random) -> dict[str, object]:
    topics = rng.sample(WORDS["topics"][split], SUBJECTS)
    told, answers = zip(*(subject(topic, split, rng) for topic in topics), strict=True)
    parts = [f"{topic.capitalize()}\n{text}" for topic, text in zip(topics, told, strict=True)]
    minutes = "\n\n".join(f"{number}. {part}" for number, part in enumerate(parts, start=1))
    turns: list[tuple[str, str]] = []
    for number in rng.sample(range(SUBJECTS), QUESTIONS[split]):
        question = rng.choice(WORDS["asked"]).format(topic=topics[number])
        if not turns:
            question = f"{minutes}\n\n{question}"
        turns += [("user", question), ("assistant", answers[number])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def rule(question: str) -> str:
    """The first person and day under the topic's heading"""
    *_, asked = question.splitlines()
    for part in question.split("\n\n"):
        heading, _, text = part.partition("\n")
        found = PERSON_AND_DAY.search(text)
        if found and heading.partition(". ")[2].lower() in asked:
            return f"{found[1]}, {found[2]}"
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(split)
        lines = [json.dumps(row(split, rng)) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
