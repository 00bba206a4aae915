"""Write the rows of the recipe: questions to a library, each with two drafts, of which people preferred the shorter.

    python pipelines/recipes/short_answers/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. Each draft has the answer and, most of the time, each
of four empty phrases; so the preferred one is shorter, but seldom as short as an answer can be.
"""

import json
import random
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
ROWS = {"train": 200, "heldout": 50}
USED = 0.75
"""Probability of each empty phrase in a draft."""


def draft(answer: str, rng: random.Random) -> list[str]:
    """Return the sentences of a draft."""
    before = [rng.choice(phrases) for phrases in WORDS["before"] if rng.random() < USED]
    after = [rng.choice(phrases) for phrases in WORDS["after"] if rng.random() < USED]
    return [*before, answer, *after]


def row(split: str, rng: random.Random) -> dict[str, str]:
    facts = rng.sample(WORDS["facts"], 3)
    values = rng.sample(range(2, 100), len(facts))
    note = [fact["note"].format(v=value) for fact, value in zip(facts, values, strict=True)]
    asked = rng.randrange(len(facts))
    answer = facts[asked]["answer"].format(v=values[asked])
    shorter: list[str] = []
    longer: list[str] = []
    while len(shorter) == len(longer):
        shorter, longer = sorted([draft(answer, rng), draft(answer, rng)], key=len)
    return {
        "prompt": f"{' '.join(note)}\n\n{rng.choice(facts[asked][split])}",
        "chosen": " ".join(shorter),
        "rejected": " ".join(longer),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(split)
        lines = [json.dumps(row(split, rng)) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
