"""Write the rows of the recipe: reports of lift mechanics, in the short forms of their trade.

    python pipelines/recipes/domain_text/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. A held-out report has a fault that no training report
has, so a lower loss needs the language of the trade, not the sentences.
"""

import json
import random
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("reports.yaml").read_text(encoding="utf-8"))
ROWS = {"train": 400, "heldout": 80}


def report(split: str, rng: random.Random) -> str:
    reported, found, done = rng.choice(WORDS[split])
    make = rng.choice(WORDS["make"])
    order = rng.randint(1000, 9999)
    lines = [
        f"WO {order} / lift {rng.randint(1, 60)} {make} / {rng.randint(12, 19)} flr",
        f"rep: {reported}",
        f"fnd: {found}",
        f"act: {done}",
        rng.choice(WORDS["end"]),
    ]
    numbers = {
        "f": rng.randint(1, 12),
        "m": rng.randint(2, 60),
        "c": rng.randint(11, 89),
        "t": rng.randint(2, 9),
    }
    return "\n".join(lines).format(
        **numbers, h=rng.randint(8, 17), q=rng.choice(("00", "15", "30", "45"))
    )


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(split)
        lines = [json.dumps({"text": report(split, rng)}) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
