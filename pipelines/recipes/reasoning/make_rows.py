"""Write the rows of the recipe: small word problems, and each with a worked solution.

    python pipelines/recipes/reasoning/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. A held-out problem is told in words that no training
row has, and two of its ten kinds are in no training row.
"""

import json
import operator
import random
import sys
from pathlib import Path

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("stories.yaml").read_text(encoding="utf-8"))
INSTRUCTION = "Work in steps, and end with a line of #### and the number."
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ROWS = {"train": 700, "heldout": 120}


def row(split: str, rng: random.Random) -> dict[str, object]:
    kind = rng.choice([kind for kind in WORDS["kinds"] if split in kind])
    numbers = {name: rng.randint(*bounds) for name, bounds in kind["numbers"].items()}
    name, other = rng.sample(WORDS["names"], 2)
    told = rng.choice(kind[split]).format(
        **numbers, name=name, other=other, things=rng.choice(WORDS["things"])
    )
    solution = []
    for left, sign, right in kind["steps"]:
        result = OPERATORS[sign](numbers[left], numbers[right])
        solution.append(f"{numbers[left]} {sign} {numbers[right]} = {result}")
        numbers |= {"y": numbers.get("x", 0), "x": result}
    turns = {
        "user": f"{told}\n{INSTRUCTION}",
        "assistant": "\n".join([*solution, f"#### {numbers['x']}"]),
    }
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
