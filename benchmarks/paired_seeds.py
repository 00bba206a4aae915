"""What docs/evidence.md says: trainings with several seeds, OLoRA at its paper's rate, the first step, the curvature.

    python benchmarks/paired_seeds.py seeds [reasoning] [json] [--seeds 18-33] [--methods lora,olora]
    python benchmarks/paired_seeds.py paper --alpaca FILE [--seeds 18-21]
    python benchmarks/paired_seeds.py first_step [reasoning] [json]
    python benchmarks/paired_seeds.py report         tables, and the figures docs/evidence-*.png

Before it, learning_rate.py tunes the rates: `reasoning json --methods lora,olora --ranks 16 --alphas 1`.
Each training is appended to a file when it ends; run several commands side by side; the same command resumes. FILE is
data/alpaca_en_demo.json of github.com/hiyouga/LLaMA-Factory (999 rows; those of at most 256 tokens are used). Trainings
are those of learning_rate.py: 20 steps of 8 rows, each row once, so that the loss of a step is that of unseen rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import learning_rate
import numpy as np
import torch
from common import MODEL, machine, model_folder, table
from learning_rate import BATCH, CPU, HELD_OUT, ROOT, STEPS, TASKS, Cell
from transformers import AutoTokenizer

from olora_ray.evaluation.statistics import Difference, crossed, per_token
from olora_ray.tokens.collate import collate
from olora_ray.train.first_step import output_shift
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_frozen

sys.path.append(str(ROOT / "pipelines"))

TESTED = 64
"""Test rows, after those that the rates were tuned on; json has 48."""
PAPER = [Cell("alpaca", method, rank, 16) for rank in (32, 64) for method in ("lora", "olora")]
PAPER_LR, LONGEST = 3e-4, 256
ITERATIONS = 10
"""Products with the Hessian."""
DISTANCE = 0.01
"""Norm of the step over which gradients are compared."""
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("seeds", "paper", "first_step", "report"))
    parser.add_argument("tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--methods", default="lora,olora")
    parser.add_argument("--seeds")
    parser.add_argument("--alpaca", type=Path)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs" / "generated" / "evidence.jsonl"
    )
    parser.add_argument(
        "--storage", default="./runs", help="where the GGUF model is dequantised to"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "report":
        report(args.results)
        return
    folder = model_folder(MODEL, args.storage)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Cell("", "lora", 1, 1).settings().model
    if args.what == "first_step":  # differences of gradients are lost in bfloat16's rounding
        model = model.model_copy(update={"dtype": "float32"})
    loss: Any = SupervisedLoss(load_frozen(folder, model, CPU))
    {"seeds": seeds, "paper": paper, "first_step": first_step}[args.what](args, loss, tokenizer)


def seeds(args: argparse.Namespace, loss: Any, tokenizer: Any) -> None:
    tuned = learning_rate.read(ROOT / "docs" / "generated" / "learning_rate.jsonl")
    for task in args.tasks:
        rows, tested = (
            learning_rate.store(tokenizer, learning_rate.chats(task, s))
            for s in ("train", "heldout")
        )
        for seed in _range(args.seeds or "18-33"):
            for cell in (Cell(task, method, 16, 16) for method in args.methods.split(",")):
                run(
                    cell,
                    seed,
                    rate(tuned[cell]),
                    loss,
                    rows,
                    tested[HELD_OUT : HELD_OUT + TESTED],
                    args.results,
                )


def rate(trained: Sequence[Line]) -> float:
    power, _ = learning_rate.vertex({each["power"]: each["loss"] for each in trained})
    return float(f"{trained[0]['auto'] * 2.0**power:.2e}")


def paper(args: argparse.Namespace, loss: Any, tokenizer: Any) -> None:
    chats = [
        learning_rate.chat(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
        for row in json.loads(args.alpaca.read_text(encoding="utf-8"))
    ]
    short = [
        pack for pack in learning_rate.store(tokenizer, chats) if len(pack.input_ids) <= LONGEST
    ]
    rows = learning_rate.HeldOut(short[TESTED:])
    print(f"{len(rows)} rows to train on, {TESTED} to test")
    for seed in _range(args.seeds or "18-21"):
        for cell in PAPER:
            run(cell, seed, PAPER_LR, loss, rows, short[:TESTED], args.results)


def run(cell: Cell, seed: int, lr: float, loss: Any, rows: Any, tested: Any, results: Path) -> None:
    """Train, unless the results have it; the loss of each step, and (tokens, summed loss) of each test row."""
    if any(each["seed"] == seed for each in read(results, cell)):
        return
    # Stores are in the order of their seed: a training's first pass is in the order of its store.
    rows = learning_rate.HeldOut(
        rows[place] for place in np.random.default_rng(seed).permutation(len(rows))
    )
    adapted, _ = learning_rate.adapt(cell, loss, rows, seed)
    trainer = Trainer(loss, adapted, cell.settings(lr, seed), CPU)
    attention = loss.model.config._attn_implementation
    loader = StepLoader(rows, trainer.config.train, seed, attention)
    steps = [step.loss for step in trainer.steps(loader, 0, Schedule(trainer.config.train, rows))]
    losses = [
        (
            int(pack.supervised.sum()),
            round(float(loss.each(collate([pack], attention)).double().sum()), 4),
        )
        for pack in tested
    ]
    line = {
        **vars(cell),
        "seed": seed,
        "lr": lr,
        "steps": [round(each, 4) for each in steps],
        "rows": losses,
    }
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{cell} seed {seed} lr {lr:.2e}: {_mean(line):.4f}", flush=True)


def first_step(args: argparse.Namespace, loss: Any, tokenizer: Any) -> None:
    """Spread of the first step's move over layers, and the largest eigenvalue of the Hessian of the factors."""
    found = []
    for task in args.tasks:
        rows = learning_rate.store(tokenizer, learning_rate.chats(task, "train")[: STEPS * BATCH])
        batch = collate(rows[:4], loss.model.config._attn_implementation)
        other = collate(rows[8:9], loss.model.config._attn_implementation)
        plain: dict[str, float] = {}
        for method in ("lora", "olora"):
            cell = Cell(task, method, 16, 16)
            adapted, _ = learning_rate.adapt(cell, loss, rows)
            # On another row than the one that the rate was measured on.
            sizes = {name: move[0] for name, move in output_shift(loss, adapted, other).items()}
            plain = plain or sizes
            relative = [sizes[name] / plain[name] for name in sizes]
            low, high = np.quantile(relative, (0.1, 0.9))
            largest = curvature(Trainer(loss, adapted, cell.settings(), CPU), loss, batch)
            found.append(
                (
                    task,
                    method,
                    f"{np.exp(np.mean(np.log(relative))):.2f}",
                    f"{high / low:.1f}",
                    f"{largest:.3g}",
                )
            )
            print(found[-1], flush=True)
    print(machine())
    print(
        table(
            ("task", "method", "move / lora's", "90% / 10% of layers", "largest curvature"), found
        )
    )


def curvature(trainer: Trainer, loss: Any, batch: Any) -> float:
    """By Lanczos' iteration, with products from differences of gradients.

    Not by power iteration: without B0 the Hessian has a pair of eigenvalues +-x.
    """
    flat, supervised = trainer.flat, len(batch.labels)
    start = flat.vector.detach().clone()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            flat.vector.copy_(at)
        flat.grad.zero_()
        (loss(batch) / supervised).backward()
        return flat.grad.detach().clone()

    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    basis: list[torch.Tensor] = []
    small = np.zeros((ITERATIONS, ITERATIONS))
    for number in range(ITERATIONS):
        basis.append(direction / direction.norm())
        step = DISTANCE * basis[-1]
        direction = (gradient(start + step) - gradient(start - step)) / (2 * DISTANCE)
        small[number, : number + 1] = [float(direction @ each) for each in basis]
        for each in basis:
            direction = direction - (direction @ each) * each
    return float(np.linalg.eigvalsh(small)[-1])


def report(results: Path) -> None:
    print(machine())
    for task in TASKS:
        found = {
            method: read(results, Cell(task, method, 16, 16))
            for method in ("lora", "olora_even", "olora")
        }
        print(shown(task, found))
        figure(task, found)
    for rank in (32, 64):
        found = {
            method: read(results, Cell("alpaca", method, rank, 16)) for method in ("lora", "olora")
        }
        print(shown(f"alpaca, rank {rank}", found))


def shown(name: str, found: dict[str, list[Line]]) -> str:
    header = ("", "lr", "seeds", "loss", "minus lora's", "95% interval", "spread of seeds", *_AT)
    return table(
        (name, *header[1:]),
        [_against(method, each, found["lora"]) for method, each in found.items() if each],
    )


_AT = tuple(f"steps {step - 2}-{step}" for step in (5, 10, 20))
"""Mean loss of these steps, which is that of unseen rows; for other methods minus LoRA's with the same seeds."""


def _against(method: str, trained: Sequence[Line], lora: Sequence[Line]) -> tuple[str, ...]:
    pairs = [(each, other) for each in trained for other in lora if each["seed"] == other["seed"]]
    own, its = (np.mean([pair[side]["steps"] for pair in pairs], axis=0) for side in (0, 1))
    first = (
        method,
        f"{trained[0]['lr']:.2e}",
        str(len(pairs)),
        f"{np.mean([_mean(each) for each, _ in pairs]):.4f}",
    )
    if trained is lora:
        return (*first, "", "", "", *(f"{own[step - 3 : step].mean():.4f}" for step in (5, 10, 20)))
    interval = (mean := difference(pairs)).interval()
    spread = float(np.std([_mean(each) - _mean(other) for each, other in pairs], ddof=1))
    at = (f"{(own - its)[step - 3 : step].mean():+.4f}" for step in (5, 10, 20))
    return (
        *first,
        f"{mean.mean:+.4f}",
        f"{interval.low:+.4f} .. {interval.high:+.4f}",
        f"{spread:.3f}",
        *at,
    )


def difference(pairs: Sequence[tuple[Line, Line]]) -> Difference:
    tokens = np.array([size for size, _ in pairs[0][0]["rows"]], dtype=np.float64)
    losses = np.array(
        [[a[1] - b[1] for a, b in zip(x["rows"], y["rows"], strict=True)] for x, y in pairs]
    )
    return crossed(per_token(losses, tokens))


def figure(task: str, found: dict[str, list[Line]]) -> None:
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    cells = learning_rate.read(ROOT / "docs" / "generated" / "learning_rate.jsonl")
    common = set.intersection(*({each["seed"] for each in trained} for trained in found.values()))
    for method, trained in found.items():
        points = sorted(
            (e["auto"] * 2.0 ** e["power"], e["loss"])
            for e in cells.get(Cell(task, method, 16, 16), [])
        )
        left.plot(*zip(*points, strict=True), "o-", label=method)
        right.plot(
            range(1, STEPS + 1),
            np.mean([e["steps"] for e in trained if e["seed"] in common], axis=0),
        )
    left.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="loss of 32 held-out rows",
        title=f"{task}: seed 17",
    )
    right.set(
        yscale="log",
        xlabel="step",
        ylabel="loss of the step",
        title=f"{task}: tuned rates, mean over {len(common)} seeds",
    )
    left.legend(frameon=False)
    fig.savefig(ROOT / "docs" / f"evidence-{task}.png", dpi=110)


def read(results: Path, cell: Cell) -> list[Line]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return [
        line
        for line in map(json.loads, lines)
        if Cell(line["task"], line["method"], line["rank"], line["alpha"]) == cell
    ]


def _mean(line: Line) -> float:
    return sum(loss for _, loss in line["rows"]) / sum(tokens for tokens, _ in line["rows"])


def _range(text: str) -> Iterator[int]:
    first, _, last = text.partition("-")
    yield from range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
