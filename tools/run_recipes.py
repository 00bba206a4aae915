"""Run recipes of pipelines/recipes, and write their numbers into their pages.

    python tools/run_recipes.py [NAME ...]     without a name: all
    python tools/run_recipes.py --check        name the pages whose numbers are older than their files

A recipe is a folder with make_rows.py (writes train.jsonl and heldout.jsonl into the folder that it is given),
config.yaml and README.md. The held-out rows are measured with the base model, with the base model and eight solved
examples before each question, and with the fine-tuned model.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "pipelines" / "recipes"
NUMBERS = re.compile(r"<!-- numbers (\w*) -->\n.*?<!-- end -->\n", re.DOTALL)
"""The part of a page that this program writes, with the digest of the files that the numbers are of."""
SHOTS = 8


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--check"]:
        old = [page for page in sorted(RECIPES.glob("*/README.md")) if not current(page)]
        print("\n".join(f"{page.relative_to(ROOT)}: its numbers are older than its files" for page in old))
        return int(bool(old))
    for name in argv or sorted(path.name for path in RECIPES.iterdir()):
        page = RECIPES / name / "README.md"
        text = numbers(RECIPES / name)
        before, _, after = NUMBERS.split(page.read_text(encoding="utf-8"))
        page.write_text(before + text + after, encoding="utf-8")
        print(text)
    return 0


def current(page: Path) -> bool:
    found = NUMBERS.search(page.read_text(encoding="utf-8"))
    return found is not None and found[1] == digest(page.parent)


def digest(recipe: Path) -> str:
    files = sorted(file for file in recipe.iterdir() if file.is_file() and file.name != "README.md")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def numbers(recipe: Path) -> str:
    began, config = time.monotonic(), yaml.safe_load((recipe / "config.yaml").read_text(encoding="utf-8"))
    rows, run, base = ROOT / "runs" / "recipes" / recipe.name, f"runs/{config['run']['name']}", config["model"]["name"]
    command(sys.executable, recipe / "make_rows.py", rows)
    command("olora-ray", "finetune", recipe / "config.yaml")
    command("olora-ray", "evaluate", run, base, "--config", recipe / "config.yaml", "--out", rows / "tuned")
    minutes = (time.monotonic() - began) / 60
    with_examples(rows)
    shown = ("data.max_length=2048", "data.last_turn_only=true", f"data.eval=[{rows / 'solved.jsonl'}]")
    command("olora-ray", "evaluate", base, "--config", recipe / "config.yaml", *shown, "--out", rows / "solved")
    tuned, solved = result(rows / "tuned"), result(rows / "solved")
    lines = [
        f"| | base model | with {SHOTS} examples in the prompt | fine-tuned | gain (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for name, value in tuned["models"][0]["metrics"].items():
        if name == "eval/perplexity":
            continue
        before, gain = tuned["models"][1]["metrics"][name], tuned["differences"].get(name)
        told = solved["models"][0]["metrics"].get(name) if name != "eval/loss" else None
        interval = f"{value - before:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else ""
        lines.append(f"| {name} | {before:.3f} | {'' if told is None else f'{told:.3f}'} | {value:.3f} | {interval} |")
    count, day = tuned["models"][0]["held_out"]["rows"], time.strftime("%B %Y")
    lines += [
        "",
        f"{count} held-out rows; rows, training and evaluation took {minutes:.0f} min on two CPU cores, {day}.",
    ]
    return f"<!-- numbers {digest(recipe)} -->\n" + "\n".join(lines) + "\n<!-- end -->\n"


def with_examples(rows: Path) -> None:
    """Write solved.jsonl: the held-out rows, each after the same solved examples of the training rows."""
    train, held_out = ([json.loads(line) for line in (rows / name).open()] for name in ("train.jsonl", "heldout.jsonl"))
    with (rows / "solved.jsonl").open("w") as file:
        for row in held_out:
            turns = [turn for each in train[:SHOTS] for turn in spoken(each)]
            system = [turn for turn in row["messages"] if turn["role"] == "system"]
            file.write(json.dumps({**row, "messages": [*system, *turns, *spoken(row)]}) + "\n")


def spoken(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for turn in row["messages"] if turn["role"] != "system"]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def command(program: str, *words: object) -> None:
    found = Path(sys.executable).with_name(program) if program == "olora-ray" else program
    subprocess.run([str(found), *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
