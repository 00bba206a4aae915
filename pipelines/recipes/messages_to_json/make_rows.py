"""Write the rows of the recipe: orders to a bakery, and each as JSON with a list of items.

    python pipelines/recipes/messages_to_json/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. Held-out orders have other phrases and other products,
so a model must copy names that it has not seen. Some orders take an item back: "two, no, three".
"""

import json
import random
import re
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
INSTRUCTION = (
    'Write the order as JSON: {"items": [{"item", "count"}], "day", "time", "deliver_to"}.'
)
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
ROWS = {"train": 420, "heldout": 100}


def item(split: str, rng: random.Random) -> tuple[dict[str, object], str]:
    """Return an item, and how the message says it."""
    name = f"{rng.choice(WORDS['first'][split])} {rng.choice(WORDS['second'][split])}"
    count = rng.choice([*WORDS["count"]])
    said = f"{rng.choice(WORDS['count'][count])} {name}"
    if count > 1:
        said += "s"
    if rng.random() < 0.15:
        said = f"{rng.choice([7, 9, 15])}, no, {said}"
    return {"item": name, "count": count}, said


def row(split: str, rng: random.Random) -> dict[str, object]:
    items, said = zip(*(item(split, rng) for _ in range(rng.randint(1, 3))), strict=True)
    day = rng.choice(DAYS)
    hour = rng.randint(6, 18)
    half = rng.choice(("00", "30"))
    other = f"{hour}.30" if half == "30" else f"{hour} o'clock"
    time = rng.choice((f"{hour}:{half}", other))
    place = rng.choice([None, rng.choice(WORDS["place"]).format(n=rng.randint(2, 99))])
    carried = rng.choice(WORDS["delivery" if place else "pickup"][split])
    listed = " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))
    parts = [rng.choice(WORDS["order"][split]), carried, rng.choice(WORDS["extra"][split])]
    text = re.sub(
        r"\[([^]]+)\]",
        lambda found: rng.choice(found[1].split("|")),
        ". ".join(filter(None, parts)),
    )
    asked = text.format(items=listed, day=day, time=time, place=place, n=rng.randint(1000, 9999))
    answer = {"items": items, "day": day, "time": f"{hour}:{half}", "deliver_to": place}
    turns = {"system": INSTRUCTION, "user": asked, "assistant": json.dumps(answer)}
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
