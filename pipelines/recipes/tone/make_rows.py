"""Write the rows of the recipe: stiff answers to customers, and the same in the tone of the house.

    python pipelines/recipes/tone/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. A held-out answer has sentences that no training row
has, so a model must carry the tone over to them.
"""

import json
import random
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
INSTRUCTION = "Rewrite the answer in the tone of Northwind."
ROWS = {"train": 440, "heldout": 80}


def row(split: str, rng: random.Random) -> dict[str, object]:
    pairs = [(rng.choice(WORDS["opening"]), WORDS["greeting"])]
    pairs += rng.sample(WORDS["sentences"][split], rng.randint(1, 3))
    names = {name: rng.choice(WORDS["facts"][name]) for name in ("first", "last")}
    answers = []
    for pair in [*pairs, (rng.choice(WORDS["closing"]), WORDS["sign"])]:
        facts = {**names, **{name: rng.choice(WORDS["facts"][name]) for name in ("product", "day")}}
        facts |= {"n": rng.randint(100, 9999), "k": rng.randint(2, 14)}
        answers.append([sentence.format(**facts) for sentence in pair])
    stiff, ours = (
        f"{first}\n{' '.join(body)}\n{last}" for first, *body, last in zip(*answers, strict=True)
    )
    turns = {"system": INSTRUCTION, "user": stiff, "assistant": ours}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(split)
        lines = [json.dumps(row(split, rng)) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
