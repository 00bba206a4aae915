"""Write the rows of the recipe: requests to a home, and the tool that is called for each.

    python pipelines/recipes/tool_calls/make_rows.py FOLDER

Writes train.jsonl and heldout.jsonl, always with the same bytes. A row has three or four tools; one request of seven
fits none of them. Held-out requests have other words, and a third of them needs a tool that no training row has.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("tools.yaml").read_text(encoding="utf-8"))
NONE = "I have no tool for that."
ROWS = {"train": 140, "heldout": 90}
TURNS = {"train": 3, "heldout": 1}
"""Requests of a row: several train as much as rows of their own, and the tools are read once."""


def definition(name: str) -> dict[str, Any]:
    tool = WORDS["tools"][name]
    properties = {argument: {"type": kind} for argument, kind in tool["arguments"].items()}
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {
        "type": "function",
        "function": {"name": name, "description": tool["about"], "parameters": parameters},
    }


def row(split: str, rng: random.Random) -> dict[str, Any]:
    known = [name for name, tool in WORDS["tools"].items() if split in tool]
    shown = rng.sample(known, rng.randint(3, 4))
    messages: list[dict[str, Any]] = []
    for _ in range(TURNS[split]):
        fits = rng.random() > 1 / 7
        name = rng.choice(shown if fits else [name for name in known if name not in shown])
        tool = WORDS["tools"][name]
        arguments = {
            argument: rng.choice(WORDS["values"][argument]) for argument in tool["arguments"]
        }
        messages.append({"role": "user", "content": rng.choice(tool[split]).format(**arguments)})
        if fits:
            called = {"type": "function", "function": {"name": name, "arguments": arguments}}
            messages.append({"role": "assistant", "tool_calls": [called]})
            messages += [
                {"role": "tool", "content": "ok"},
                {"role": "assistant", "content": "Done."},
            ]
        else:
            messages.append({"role": "assistant", "content": NONE})
    if split == "heldout" and fits:
        messages = messages[:2]  # the call is what is asked for
    return {"messages": messages, "tools": [definition(name) for name in shown]}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(split)
        lines = [json.dumps(row(split, rng)) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
