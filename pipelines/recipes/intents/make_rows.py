"""Write the rows of the recipe: messages to a shop, and which of twelve intents each has.

    python pipelines/recipes/intents/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. A held-out message has a phrase that no training
message has, so a model must know what the words mean.
"""

import json
import random
import re
import sys
from pathlib import Path

import yaml

INSTRUCTION = "Name the intent of the message."
PRODUCTS = (
    "lamp",
    "kettle",
    "desk",
    "chair",
    "tent",
    "jacket",
    "drill",
    "mixer",
    "rug",
    "mirror",
    "bicycle",
    "radio",
)
BEFORE = ("", "", "", "hello, ", "hi there. ", "good morning! ")
AFTER = ("", "", "", " thanks", " please help", " it is urgent")
ROWS = {"train": 50, "heldout": 12}
"""Rows of each intent."""


def message(phrase: str, rng: random.Random) -> str:
    product, other = rng.sample(PRODUCTS, 2)
    chosen = re.sub(r"\[([^]]+)\]", lambda found: rng.choice(found[1].split("|")), phrase)
    order = f"{rng.randrange(10, 99)}-{rng.choice('ABKMX')}{rng.choice('PRTVZ')}-{rng.randrange(10, 99)}"
    return (
        rng.choice(BEFORE)
        + chosen.format(product=product, other=other, order=order)
        + rng.choice(AFTER)
    )


def rows(split: str, rng: random.Random) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for intent, phrases in yaml.safe_load(
        Path(__file__).with_name("phrases.yaml").read_text()
    ).items():
        for number in range(ROWS[split]):
            asked = {
                "role": "user",
                "content": message(phrases[split][number % len(phrases[split])], rng),
            }
            answer = {"role": "assistant", "content": intent}
            made.append({"messages": [{"role": "system", "content": INSTRUCTION}, asked, answer]})
    rng.shuffle(made)
    return made


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        lines = [json.dumps(row) + "\n" for row in rows(split, random.Random(split))]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
