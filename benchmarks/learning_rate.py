"""The learning rate that `train.lr: auto` chooses, beside the tuned one, for methods, ranks and scales.

A cell is a method with a rank and an alpha on a task. It is trained at the automatic rate and at rates by factors of 2
around it, until the best one has a worse neighbour on both sides. The tuned rate is the vertex of the parabola in log
lr through the best rate and its neighbours. All trainings of a task see the same rows in the same order, without Ray,
one after the other, on one thread. Each is appended to a file when it ends. Run several commands with other cells side
by side; the same command resumes.

    python pipelines/contrib/evidence/make_reasoning.py --out build/evidence/reasoning
    python benchmarks/learning_rate.py [reasoning] [json] [--methods lora,olora] [--ranks 16] [--alphas 1,2]
    python benchmarks/learning_rate.py rates         note today's automatic rate of each cell, without a training
    python benchmarks/learning_rate.py table         what has been trained so far (docs/generated/learning_rate.md)

SmolLM2-135M-Instruct, dequantised from Q4_1, in bfloat16; 20 steps of 8 rows; loss on 32 held-out rows. Other bases
(--model), and rows for more --steps, come from learning_rate_bases.py.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import MODEL, MemoryStore, config, machine, model_folder, table
from transformers import AutoTokenizer

from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, inject, remove
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.config.schema import Config
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import first_step
from olora_ray.train.data_driven import new_factors
from olora_ray.train.first_step import Move
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_frozen

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
TASKS = {
    "reasoning": BUILD / "evidence" / "reasoning",
    "json": ROOT / "pipelines" / "quickstart",
    "reasoning+": BUILD / "learning_rate" / "reasoning",
    "json+": BUILD / "learning_rate" / "json",
    "short": BUILD / "learning_rate" / "short",
}
SMALLEST = "SmolLM2-135M"
MODELS = {
    SMALLEST: MODEL,
    "Gemma-3-270M": str(BUILD / "learning_rate" / "gemma-3-270m-q4_k_m.gguf"),
    "own": str(BUILD / "learning_rate" / "own"),
}
STEPS, BATCH, HELD_OUT, SEED = 20, 8, 32, 17
MOST = 10
"""Trainings per cell."""
CPU = torch.device("cpu")
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    rank: int
    alpha: float
    steps: int = STEPS
    model: str = SMALLEST

    def settings(self, lr: float = 1.0, seed: int = SEED) -> Config:
        own = self.model == "own"  # twice as fast like this
        return config(
            "unused",
            {"name": "unused", "dtype": "float32" if own else "bfloat16"},
            run={"name": "unused", "storage": "unused", "seed": seed},
            adapter={"method": self.method, "rank": self.rank, "alpha": self.alpha},
            train={
                "global_batch": BATCH,
                "micro_batch": BATCH if own else 4,
                "steps": self.steps,
                "lr": lr,
            },
            cluster={"workers": 1},
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tasks", nargs="*", help="reasoning, json (default: both), or table", default=[*TASKS]
    )
    parser.add_argument("--methods", default="lora,olora,pissa,nora")
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--alphas", default="1,2", help="alpha divided by rank")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--first", type=int, default=0, help="power of 2 of the automatic rate to begin with"
    )
    parser.add_argument("--model", choices=MODELS, default=SMALLEST)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs" / "generated" / "learning_rate.jsonl"
    )
    parser.add_argument(
        "--storage", default="./runs", help="where the GGUF model is dequantised to"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tasks == ["rates"]:
        measure(args)
    elif args.tasks != ["table"]:
        train(args)
    print(machine())
    print(shown(read(args.results), rates(args.results)))


def train(args: argparse.Namespace) -> None:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    loss, tokenizer = loaded(args)
    for task in args.tasks:
        # The answers of short rows have two tokens or three.
        held_out = stored(task, "heldout", HELD_OUT * (8 if task == "short" else 1), tokenizer)
        rows = stored(task, "train", args.steps * BATCH, tokenizer)
        for rank in map(int, args.ranks.split(",")):
            for factor in map(float, args.alphas.split(",")):
                for method in args.methods.split(","):
                    cell = Cell(task, method, rank, factor * rank, args.steps, args.model)
                    tune(cell, loss, rows, held_out, args.results, args.first)


def measure(args: argparse.Namespace) -> None:
    """Note the automatic rate of each cell of the model, as the code chooses it now."""
    loss, tokenizer = loaded(args)
    for cell in read(args.results):
        if cell.model == args.model and cell not in rates(args.results):
            rows = stored(cell.task, "train", cell.steps * BATCH, tokenizer)
            _, moves = adapt(cell, loss, rows)
            append(args.results, {**vars(cell), "auto": automatic(cell, moves)})


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    folder = model_folder(MODELS[args.model], args.storage)
    model = load_frozen(folder, Cell("", "lora", 1, 1, model=args.model).settings().model, CPU)
    return SupervisedLoss(model), AutoTokenizer.from_pretrained(folder)


def stored(task: str, split: str, count: int, tokenizer: Any) -> Any:
    return store(
        tokenizer, chats(task, split)[:count], task == "short" or tokenizer.chat_template is None
    )


def chats(task: str, split: str) -> list[Chat]:
    lines = (TASKS[task] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        row.get("messages") or chat(row["prompt"], row["completion"])
        for row in map(json.loads, lines)
    ]


def chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def store(tokenizer: Any, rows: Iterable[Chat], plain: bool = False) -> Any:
    """One chat per sequence; the last answer and its end are supervised. `plain`: its messages are lines of text."""
    packs = []
    for row in rows:
        if plain:
            asked = "".join(message["content"] + "\n" for message in row[:-1])
            whole = asked + row[-1]["content"] + tokenizer.eos_token
        else:
            whole = tokenizer.apply_chat_template(row, tokenize=False).rstrip("\n")
            asked = tokenizer.apply_chat_template(
                row[:-1], tokenize=False, add_generation_prompt=True
            )
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (asked, whole[len(asked) :])
        )
        ids = np.array(prompt + answer)
        packs.append(Pack(ids, np.arange(len(ids)) >= len(prompt), (len(ids),)))
    return HeldOut(packs)


class HeldOut(MemoryStore):
    @property
    def manifest(self) -> Any:
        return SimpleNamespace(supervised=sum(int(pack.supervised.sum()) for pack in self))


def tune(cell: Cell, loss: Any, rows: Any, held_out: Any, results: Path, first: int) -> None:
    """Train a cell at rates around the automatic one, as far as they are not in the results."""
    while (power := following(losses(trained := read(results).get(cell, [])), first)) is not None:
        adapted, moves = adapt(cell, loss, rows)
        # The automatic rate of the first training stays the middle of the grid.
        auto = trained[0]["auto"] if trained else automatic(cell, moves)
        trainer = Trainer(loss, adapted, cell.settings(auto * 2.0**power), CPU)
        attention = loss.model.config._attn_implementation
        loader = StepLoader(rows, trainer.config.train, SEED, attention)
        try:
            for _ in trainer.steps(loader, 0, Schedule(trainer.config.train, rows)):
                pass
            found = evaluate(trainer, held_out, attention).loss
        except Exception as error:  # diverged
            print(error)
            found = math.inf
        found_or_none = found if math.isfinite(found) else None
        append(results, {**vars(cell), "auto": auto, "power": power, "loss": found_or_none})
        print(f"{cell} lr {auto * 2.0**power:.2e} ({2.0**power:g} x auto): {found:.4f}", flush=True)


def automatic(cell: Cell, moves: dict[str, Move]) -> float:
    return first_step.peak_lr(moves, cell.settings().adapter.scale(), cell.steps)


def append(results: Path, line: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def losses(trained: list[dict[str, Any]]) -> dict[int, float | None]:
    return {each["power"]: each["loss"] for each in trained}


def adapt(
    cell: Cell, loss: Any, rows: Any, seed: int = SEED
) -> tuple[dict[str, AdaptedWeight], dict[str, Move]]:
    """Put new adapters into the model; how far the first step moves each layer."""
    remove(loss.model)
    settings = cell.settings(seed=seed)
    targets = find_targets(loss.model, "all-linear", cell.rank)
    factors, *_ = new_factors(loss, targets, settings, rows, CPU)
    adapted = inject(loss.model, at_scale(factors, settings.adapter), settings.adapter.scale())
    batch = collate(first_step.examples(rows[:8]), loss.model.config._attn_implementation)
    return adapted, first_step.output_shift(loss, adapted, batch)


def following(losses: dict[int, float | None], first: int = 0) -> int | None:
    """The next power of 2 to try; None once the best has worse neighbours on both sides, or there are too many."""
    if not losses:
        return first
    best = min(losses, key=lambda power: _number(losses[power]))
    missing = [power for power in (best + 1, best - 1) if power not in losses]
    return missing[0] if missing and len(losses) < MOST else None


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss


def vertex(losses: dict[int, float | None]) -> tuple[float, float]:
    """(log2 of the tuned rate / the middle of the grid, its loss) from the best rate and its neighbours."""
    best = min(losses, key=lambda power: _number(losses[power]))
    low, here, high = (_number(losses.get(power)) for power in (best - 1, best, best + 1))
    bend = low - 2 * here + high
    if not math.isfinite(bend) or bend <= 0:
        return float(best), here
    offset = (low - high) / (2 * bend)
    return best + offset, here - bend * offset**2 / 2


def read(results: Path) -> dict[Cell, list[dict[str, Any]]]:
    """The trainings of each cell."""
    found: dict[Cell, list[dict[str, Any]]] = {}
    for cell, row in lines(results):
        if "power" in row:
            found.setdefault(cell, []).append(row)
    return found


def rates(results: Path) -> dict[Cell, float]:
    """The automatic rate of each cell, as it was measured last without a training."""
    return {cell: row["auto"] for cell, row in lines(results) if "power" not in row}


def lines(results: Path) -> list[tuple[Cell, dict[str, Any]]]:
    rows = map(
        json.loads, results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    )
    return [
        (Cell(**{each.name: row[each.name] for each in fields(Cell) if each.name in row}), row)
        for row in rows
    ]


def shown(cells: dict[Cell, list[dict[str, Any]]], now: dict[Cell, float]) -> str:
    """The tuned rate of each complete cell, the automatic one divided by it, and how many are within the bounds."""
    rows, within = dict[tuple[Any, ...], dict[str, str]](), dict[int, list[bool]]()
    for cell, trained in cells.items():
        if following(losses(trained)) is not None:
            continue
        power, _ = vertex(losses(trained))
        tuned = trained[0]["auto"] * 2**power
        ratio = now.get(cell, trained[0]["auto"]) / tuned
        within.setdefault(cell.steps, []).append(0.5 <= ratio <= 2)
        row = rows.setdefault((cell.steps, cell.model, cell.task, cell.rank, cell.alpha), {})
        row[cell.method] = f"{tuned:.1e} {ratio:.2f}"
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    header = ("model", "steps", "task", "rank", "alpha", *methods)
    body = [
        (
            model,
            f"{steps:,}",
            task,
            str(rank),
            f"{alpha:g}",
            *(row.get(method, "-") for method in methods),
        )
        for (steps, model, task, rank, alpha), row in sorted(rows.items())
    ]
    counts = (
        f"{steps:,} steps: {sum(each)} of {len(each)} cells within a factor of 2"
        for steps, each in sorted(within.items())
    )
    return "\n".join((table(header, body), "", *counts))


if __name__ == "__main__":
    main()
