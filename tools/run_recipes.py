"""Run recipes of pipelines/recipes and pipelines/contrib, and write their numbers into their pages.

    python tools/run_recipes.py [NAME ...]     without a name: all
    python tools/run_recipes.py --check        name the pages whose numbers are older than their files
    python tools/run_recipes.py --gallery      only README.md and scores.png of pipelines/recipes
    python tools/run_recipes.py --rows         only the rows, configs and answers on all pages; trains nothing

A recipe is a folder with make_rows.py (writes train.jsonl and heldout.jsonl into the folder that it is given),
config.yaml and README.md. The held-out rows are measured with the fine-tuned model, with the base model, with the base
model and up to eight solved examples before each question, and with the function `rule` of make_rows.py, if any.

If the rows are preference pairs, a second training takes their chosen answers alone, in as many steps. Both are also
measured on the rows of the gate's guard.

Each page also shows three rows, the config, and three held-out answers before and after, once a run has kept them.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import yaml

from olora_ray.common.statistics import difference
from olora_ray.common.text import plural, shortened
from olora_ray.train.scoring import Judge

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ROOT / "pipelines"
RECIPES = PIPELINES / "recipes"
Scores = dict[str, dict[int, float]]
NUMBERS = re.compile(r"<!-- numbers (\w*) -->\n.*?<!-- end -->\n", re.DOTALL)
"""The part of a page that this program writes, with the digest of the files that the numbers are of."""
SHOWN = re.compile(r"<!-- rows -->\n.*?<!-- end of rows -->\n", re.DOTALL)
"""The part with rows, config and answers."""
EXAMPLES = 3
CELL = 240
"""Most characters of a text in a row or answer."""
SHOTS = 8
LONGEST = 4000
"""Most characters of the examples, as JSON: fewer examples are shown than SHOTS if they are longer."""

PLAIN = "plain training on the chosen answers"
ALONE = (
    "data.packing=false",
    "train.objective=tokens",
    "train.chosen=0",
    "train.lr=auto",
    "gate.metric=eval/loss",
)
GUARD = ROOT / "olora_ray" / "retrain" / "guard.jsonl"
PREFERRED = "eval/pairs/preferred"
MARGIN = "eval/pairs/margin"
CHOSEN = "eval/pairs/chosen"
PREDICTORS = ("fine-tuned", "base model", "base model with examples")
GALLERY = """# Recipes

Copy what is nearest to your task with `olora-ray init --recipe NAME`, and put your rows in the place of its rows. Each
takes SmolLM2-135M; its page says how long. In a checkout, `python tools/run_recipes.py NAME` makes the rows, trains,
measures and writes the numbers into the page; `make recipes` runs all.

![Scores of the recipes](scores.png)

{}

A row has the strictest score of its recipe: its page has the others, with intervals, and what a simple rule reaches.
Only a loss is better if it is lower.
"""


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--check"]:
        old = [page for page in pages().values() if not current(page)]
        print(
            "\n".join(
                f"{page.relative_to(ROOT)}: its numbers are older than its files" for page in old
            )
        )
        return int(bool(old))
    if list(argv) == ["--rows"]:
        for page in pages().values():
            write_rows(page)
        return 0
    names = argv or list(pages())
    sys.path.append(str(PIPELINES))
    for name in [] if names == ["--gallery"] else names:
        page = pages()[name]
        text = numbers(page.parent)
        before, _, after = NUMBERS.split(page.read_text(encoding="utf-8"))
        page.write_text(before + text + after, encoding="utf-8")
        write_rows(page)
        print(text)
    write_gallery()
    return 0


def pages() -> dict[str, Path]:
    """Return name -> page of all recipes, sorted: those of pipelines/recipes, and those of applications."""
    found = [*RECIPES.glob("*/README.md"), *PIPELINES.glob("contrib/*/*/README.md")]
    return {page.parent.name: page for page in sorted(found, key=lambda page: page.parent.name)}


def current(page: Path) -> bool:
    found = NUMBERS.search(page.read_text(encoding="utf-8"))
    return found is not None and found[1] == digest(page.parent)


def digest(recipe: Path) -> str:
    files = sorted(file for file in recipe.iterdir() if file.is_file() and file.name != "README.md")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def gallery() -> tuple[str, dict[str, list[float]]]:
    """Return the page of all recipes, with the strictest score of each, and recipe -> score by predictor."""
    table, drawn = [["recipe", "score", *PREDICTORS], ["---"] * 5], dict[str, list[float]]()
    for page in pages().values():
        text = page.read_text(encoding="utf-8")
        title, part = text.partition("\n")[0][2:], NUMBERS.search(text)
        rows = (
            [[cell.strip() for cell in line.split("|")[1:-1]] for line in part[0].splitlines()]
            if part
            else []
        )
        scores = [row for row in rows if row and row[0].startswith("eval/")]
        score, *told = min(reversed(scores[1:] or scores), key=lambda row: float(row[1]))
        values = [cell.partition(";")[0] for cell in told[:3]]
        table.append(
            [
                f"[{title}]({os.path.relpath(page, RECIPES)})",
                score,
                *values,
                *[""] * (3 - len(values)),
            ]
        )
        if scores[1:]:
            drawn[title.partition(":")[0]] = [float(value) for value in values]
    return GALLERY.format("\n".join("| " + " | ".join(cells) + " |" for cells in table)), drawn


def write_gallery() -> None:
    from matplotlib.figure import Figure

    page, scores = gallery()
    (RECIPES / "README.md").write_text(page, encoding="utf-8")
    figure = Figure(figsize=(8, 0.6 * len(scores) + 0.8), layout="constrained")
    axes = figure.subplots()
    for place, (label, color) in enumerate(
        zip(PREDICTORS, ("#d9480f", "#adb5bd", "#495057"), strict=True)
    ):
        heights = [index + 0.27 * (place - 1) for index in range(len(scores))]
        axes.barh(
            heights, [values[place] for values in scores.values()], 0.25, label=label, color=color
        )
    axes.set_yticks(range(len(scores)), [*scores])
    axes.set(xlim=(0, 1), xlabel="score on held-out rows", ylim=(len(scores) - 0.5, -0.5))
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(RECIPES / "scores.png", dpi=120)


def write_rows(page: Path) -> None:
    """Write the rows, the config and the answers of a recipe into its page, behind the numbers."""
    recipe = page.parent
    rows = ROOT / "runs" / "recipes" / recipe.name
    if not (rows / "train.jsonl").is_file():
        command(sys.executable, recipe / "make_rows.py", rows)
    examples = lines_of(rows / "train.jsonl")[:EXAMPLES]
    parts = ["## Three rows", "", "```json"]
    parts += [json.dumps(cut(row), ensure_ascii=False) for row in examples]
    config = (recipe / "config.yaml").read_text(encoding="utf-8").strip()
    parts += ["```", "", "## The config", "", "```yaml", config, "```", ""]
    answers = answers_of(rows)
    if answers:
        parts += ["## Three held-out answers", "", "```text", *answers, "```", ""]
    text = "\n".join(["<!-- rows -->", *parts, "<!-- end of rows -->", ""])
    old = page.read_text(encoding="utf-8")
    before, end, after = SHOWN.sub("", old).rstrip("\n").partition("<!-- end -->\n")
    page.write_text(f"{before}{end}{after}\n\n{text}", encoding="utf-8")


def cut(value: Any) -> Any:
    """Return a row with its long texts shortened."""
    if isinstance(value, str):
        return shortened(value, CELL)
    if isinstance(value, list):
        return [cut(each) for each in value]
    if isinstance(value, dict):
        return {name: cut(each) for name, each in value.items()}
    return value


def answers_of(rows: Path) -> list[str]:
    """Return the first held-out answers of the run and of its base model; [] if no run has kept them."""
    file = rows / "tuned" / "answers.jsonl"
    if not file.is_file():
        return []
    asked = lines_of(rows / "heldout.jsonl")
    by_origin: dict[str, list[dict[str, Any]]] = {}
    for answer in lines_of(file):
        by_origin.setdefault(answer["origin"], []).append(answer)
    found = []
    for origin, (tuned, base) in [*by_origin.items()][:EXAMPLES]:
        row = as_chat(asked[int(origin.rpartition(":")[2]) - 1])
        texts = {
            "prompt": row["messages"][-2]["content"],
            "wanted": tuned["reference"],
            "before": base["text"],
            "after": tuned["text"],
        }
        for name, text in texts.items():
            found.append(f"{name + ':':8}{shortened(' '.join(str(text).split()), CELL)}")
        found.append("")
    return found[:-1]


def numbers(recipe: Path) -> str:
    config = yaml.safe_load((recipe / "config.yaml").read_text(encoding="utf-8"))
    rows, run, base = (
        ROOT / "runs" / "recipes" / recipe.name,
        f"runs/{config['run']['name']}",
        config["model"]["name"],
    )
    evaluate = ("--config", recipe / "config.yaml", "--out")
    shutil.rmtree(
        ROOT / run, ignore_errors=True
    )  # a finished run would not train again, and the minutes be too few
    seconds = command(sys.executable, recipe / "make_rows.py", rows)
    # The evaluation below answers all held-out rows, so the run answers only a few.
    seconds += command("olora-ray", "finetune", recipe / "config.yaml", "evaluation.rows=8")
    seconds += command("olora-ray", "evaluate", run, base, *evaluate, rows / "tuned")
    tuned, base_model = read(rows / "tuned" / "evaluation.json"), "the base model"
    ours, others = scores(rows / "tuned", run), {base_model: scores(rows / "tuned", base)}
    if shots := with_examples(rows):
        shown = (
            "data.max_length=2560",
            "data.last_turn_only=true",
            f"data.eval=[{rows / 'solved.jsonl'}]",
        )
        command("olora-ray", "evaluate", base, *evaluate, rows / "solved", *shown)
        others[f"it with {plural(shots, 'example')} in the prompt"] = scores(rows / "solved", base)
    of_pairs: list[list[str]] = []
    if PREFERRED in tuned["models"][0]["metrics"]:
        plain, spent = plain_training(config, recipe, rows)
        seconds += spent + command("olora-ray", "evaluate", plain, *evaluate, rows / "plain")
        others[PLAIN] = scores(rows / "plain", plain)
        of_pairs = pair_rows(tuned, rows, (run, base, plain), evaluate)
    others |= by_rule(recipe, rows, config.get("evaluation", {}).get("scorer"))
    group = config.get("gate", {}).get("group")
    names = [str(row.get(group, line)) for line, row in enumerate(lines_of(rows / "heldout.jsonl"))]
    groups = [names.index(name) for name in names]
    loss, before = (model["metrics"]["eval/loss"] for model in tuned["models"])
    table = [
        ["", "fine-tuned", *(f"{other}, and the gain over it" for other in others)],
        ["---"] * (len(others) + 2),
    ]
    table += [
        ["eval/loss", f"{loss:.3f}", f"{before:.3f}; {gain(tuned['differences']['eval/loss'])}"]
    ]
    table += of_pairs
    table += [
        [
            f"eval/{name}",
            f"{fmean(values.values()):.3f}",
            *(against(values, other.get(name), groups) for other in others.values()),
        ]
        for name, values in ours.items()
    ]
    lines = [
        "| " + " | ".join([*cells, *[""] * (len(others) + 2 - len(cells))]) + " |"
        for cells in table
    ]
    lines += [
        "",
        f"{tuned['models'][0]['held_out']['rows']} held-out rows; intervals of 95 %. Rows, training and evaluation",
        f"took {seconds / 60:.0f} CPU minutes, so {seconds / 120:.0f} or more on two cores ({time.strftime('%B %Y')}).",
    ]
    return f"<!-- numbers {digest(recipe)} -->\n" + "\n".join(lines) + "\n<!-- end -->\n"


def plain_training(config: Mapping[str, Any], recipe: Path, rows: Path) -> tuple[str, float]:
    """Train on the chosen answers of the pairs alone; return the run's folder and the CPU seconds."""
    name = f"{config['run']['name']}-plain"
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    changes = [f"run.name={name}", "evaluation.rows=8", *ALONE]
    for field, file in (("train", "train"), ("eval", "heldout")):
        path = rows / f"{file}.jsonl"
        changes.append(f"data.{field}=[{{path: {path}, fields: {{rejected: none}}}}]")
    return f"runs/{name}", command("olora-ray", "finetune", recipe / "config.yaml", *changes)


def pair_rows(
    tuned: Mapping[str, Any], rows: Path, models: Sequence[str], evaluate: Sequence[object]
) -> list[list[str]]:
    """Return the table's rows of held-out pairs and of the guard, for run, base and plain training."""
    run, base, plain = models
    held_out = [each["metrics"] for each in tuned["models"]]
    held_out += [each["metrics"] for each in read(rows / "plain" / "evaluation.json")["models"]]
    without = ("data.eval=[" + str(GUARD) + "]", "evaluation.scorer=null")
    guarded = []
    for name, both in (("guard", (run, base)), ("guard-plain", (plain,))):
        command("olora-ray", "evaluate", *both, *evaluate, rows / name, *without)
        measured = read(rows / name / "evaluation.json")["models"]
        guarded += [each["metrics"]["eval/loss"] for each in measured]
    found = []
    for label, (ours, before, alone), digits in (
        ("pairs preferred", [each[PREFERRED] for each in held_out], 2),
        ("pairs' margin, nats", [each[MARGIN] for each in held_out], 1),
        ("log p chosen, nats", [each[CHOSEN] for each in held_out], 1),
        ("loss on the guard rows", guarded, 3),
    ):
        cells = [f"{value:.{digits}f}" for value in (ours, before, alone)]
        found.append([label, *cells[:2], "", cells[2]])
    return found


def gain(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def against(
    ours: Mapping[int, float], theirs: Mapping[int, float] | None, groups: Sequence[int]
) -> str:
    if not theirs:
        return ""
    lines = sorted(ours.keys() & theirs)
    left, right = ([each[line] for line in lines] for each in (ours, theirs))
    interval = difference(left, right, groups=[groups[line - 1] for line in lines])
    return f"{fmean(theirs.values()):.3f}; {gain(asdict(interval))}"


def scores(folder: Path, model: str) -> Scores:
    """Return the scores of a model's answers: name -> line of the held-out rows -> value; {} without a scorer."""
    found: Scores = {}
    if (file := folder / "answers.jsonl").is_file():
        for answer in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if answer["model"] == model:
                for name, value in answer["scores"].items():
                    found.setdefault(name, {})[int(answer["origin"].rpartition(":")[2])] = value
    return found


def by_rule(recipe: Path, rows: Path, scorer: str | None) -> dict[str, Scores]:
    """Return the scores of the function `rule` of make_rows.py, if it has one; its docstring is the rule's name."""
    module = ".".join((*recipe.relative_to(PIPELINES).parts, "make_rows"))
    rule = getattr(import_module(module), "rule", None)
    if not rule or not scorer:
        return {}
    found: Scores = {}
    judge = Judge(scorer)
    for line, row in enumerate(lines_of(rows / "heldout.jsonl"), start=1):
        *asked, answer = row["messages"]
        for name, value in judge(rule(asked[-1]["content"]), answer["content"]).items():
            found.setdefault(name, {})[line] = value
    return {rule.__doc__.strip(" ."): found}


def with_examples(rows: Path) -> int:
    """Write solved.jsonl: the held-out rows, each after the same solved examples of the training rows.

    Returns the number of examples, at most SHOTS; 0 if the rows are no chats.
    """
    train, held_out = (
        [as_chat(row) for row in lines_of(rows / f"{split}.jsonl")]
        for split in ("train", "heldout")
    )
    if "messages" not in train[0]:
        return 0
    examples = [spoken(row) for row in train[:SHOTS]]
    while len(examples) > 1 and len(json.dumps(examples)) > LONGEST:
        examples.pop()
    with (rows / "solved.jsonl").open("w") as file:
        for row in held_out:
            system = [turn for turn in row["messages"] if turn["role"] == "system"]
            file.write(
                json.dumps({**row, "messages": [*system, *chain(*examples), *spoken(row)]}) + "\n"
            )
    return len(examples)


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row; a preference pair as a chat with the chosen answer."""
    if "chosen" not in row:
        return row
    turns = {"user": row["prompt"], "assistant": row["chosen"]}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def spoken(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for turn in row["messages"] if turn["role"] != "system"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def command(program: str, *words: object) -> float:
    """Run a command, and return the CPU seconds of its processes; the clock would count other programs, too."""
    found = Path(sys.executable).with_name(program) if program == "olora-ray" else program
    main, seconds = psutil.Popen([str(found), *map(str, words)], cwd=ROOT), dict[int, float]()
    while main.poll() is None:
        with suppress(psutil.Error):
            for process in [main, *main.children(recursive=True)]:
                with suppress(psutil.Error):
                    seconds[process.pid] = sum(process.cpu_times()[:2])
        time.sleep(0.5)
    if main.returncode:
        raise SystemExit(f"{found} {' '.join(map(str, words))}: ended with {main.returncode}")
    return sum(seconds.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
