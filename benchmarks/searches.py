"""Searches of tiny models, each trial to its end, and what rules that stop trials early would have made of them.

There are 20 searches of 16 trials: other tasks, base models, methods, spaces and seeds. All trials of a search see the
same rows in the same order. Their losses are recorded, and a replay runs each rule over them, with the schedulers that
Ray Tune gets, one trial after the other in 40 orders; the unchanged config is always the first.

The numbers of a rule: the share of all steps that are done; how often the winner is the best trial, or behind it by
less than a share of the best trial's gain over the base model; and how far behind it is, on average and at most.

    python benchmarks/searches.py replay         of the searches in benchmarks/searches.jsonl.gz
    python benchmarks/searches.py record [--out FILE]
"""

import argparse
import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import MemoryStore, config, met, table
from learning_rate import HeldOut
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, inject, remove
from olora_ray.common.errors import UserError
from olora_ray.sweep.schedulers import scheduler
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import PAIRED, PROGRESS, WHOLE, SweepSpec, trial_name
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import first_step
from olora_ray.train.data_driven import new_factors
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss

FILE = Path(__file__).resolve().parent / "searches.jsonl.gz"
SEARCHES, TRIALS, STEPS, BATCH, HELD_OUT = 20, 16, 96, 8, 64
PARTS, ORDERS = 16, 40
CPU = torch.device("cpu")
WORDS = [
    "tree",
    "lamp",
    "river",
    "stone",
    "cloud",
    "paper",
    "green",
    "seven",
    "music",
    "table",
    "north",
    "glass",
    "horse",
    "apple",
    "winter",
    "bread",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "replay"))
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "record":
        done = {line["search"] for line in read(args.out)} if args.out.exists() else set()
        for number in range(SEARCHES):
            if number not in done:
                line = record(number)
                with gzip.open(args.out, "at") as file:
                    file.write(json.dumps(line) + "\n")
    else:
        print(replay(read(args.out)))


def read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


# Tasks: short questions and answers, in bytes.


def text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 4)))


def addition(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    return f"{a}+{b}=", str(a + b)


def backwards(draw: random.Random) -> tuple[str, str]:
    words = text(draw)
    return f"{words} <", words[::-1]


def fields(draw: random.Random) -> tuple[str, str]:
    who, many, what = draw.choice(WORDS), draw.randint(1, 99), draw.choice(WORDS)
    return f"{who} has {many} {what}:", json.dumps({"who": who, "n": many, "what": what})


def in_order(draw: random.Random) -> tuple[str, str]:
    words = text(draw)
    return f"{words} >", " ".join(sorted(words.split()))


def capitals(draw: random.Random) -> tuple[str, str]:
    words = text(draw)
    return f"{words} ^", words.upper()


TASKS = (addition, backwards, fields, in_order, capitals)


def pack(question: str, answer: str) -> Pack:
    ids = np.frombuffer(f"{question}{answer}\n".encode(), np.uint8).astype(np.int64) + 1
    return Pack(ids, np.arange(len(ids)) >= len(question), (len(ids),))


def base(kind: int) -> Any:
    """A small Llama that has learnt to write words, sums and copies, but none of the tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(kind)
    width = (64, 96)[kind % 2]
    shape = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=(4, 3)[kind % 2],
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw = random.Random(kind)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50, (500 - step) / 200)
        lines = []
        for _ in range(24):
            words = text(draw)
            lines.append(
                draw.choice(
                    [f"{words} = {words}", f"{draw.randint(0, 99)} {words}", f"{words} {words}"]
                )
            )
        ids = torch.zeros(24, 64, dtype=torch.long)
        for row, line in enumerate(lines):
            piece = torch.tensor(list(f"{line}\n".encode())[:64]) + 1
            ids[row, : len(piece)] = piece
        labels = ids.masked_fill(ids == 0, -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def record(number: int) -> dict[str, Any]:
    task, method = TASKS[number % len(TASKS)], ("olora", "lora", "pissa", "olora")[number % 4]
    loss: Any = SupervisedLoss(base(number // 2))
    draw = random.Random(number)
    rows = MemoryStore([pack(*task(draw)) for _ in range(STEPS * BATCH)])
    held_out = HeldOut([pack(*task(draw)) for _ in range(HELD_OUT)])
    # The automatic rate is far too low for models this small: the spaces lie around the best power of 4 times it.
    coarse = [
        train(loss, rows, held_out, number, method, 16, 16, None, 4.0**power)
        for power in range(-1, 5)
    ]
    middle = min(coarse, key=lambda each: each["held_out"][-1] if each["ended"] else math.inf)[
        "factor"
    ]
    absolute, trials, auto = number % 2 == 1, [], None
    for trial in range(TRIALS):
        # The first trial is the unchanged config, as in a search.
        rank = draw.choice((4, 8, 16, 32)) if trial else 16
        alpha = rank * draw.choice((0.5, 1, 2)) if trial else 16
        factor = middle * 4 ** draw.uniform(-1.5 if absolute else -1, 1) if trial else middle
        rate = auto * factor if absolute and auto else None
        found = train(loss, rows, held_out, number, method, rank, alpha, rate, factor)
        auto = auto or found["lr"] / middle
        trials.append(found)
        print(
            number,
            task.__name__,
            method,
            trial,
            rank,
            alpha,
            f"{found['lr']:.2e} {found['held_out'][-1]}",
            flush=True,
        )
    return {
        "search": number,
        "task": task.__name__,
        "method": method,
        "middle": middle,
        "trials": trials,
    }


def train(
    loss: Any,
    rows: Any,
    held_out: Any,
    seed: int,
    method: str,
    rank: int,
    alpha: float,
    rate: float | None,
    factor: float,
) -> dict[str, Any]:
    def settings(lr: float) -> Any:
        return config(
            "unused",
            {"name": "unused", "dtype": "float32"},
            run={"name": "unused", "storage": "unused", "seed": seed},
            adapter={"method": method, "rank": rank, "alpha": alpha},
            train={"global_batch": BATCH, "micro_batch": BATCH, "steps": STEPS, "lr": lr},
            cluster={"workers": 1},
        )

    remove(loss.model)
    first = settings(1.0)
    targets = find_targets(loss.model, "all-linear", rank)
    factors, *_ = new_factors(loss, targets, first, rows, CPU)
    adapted = inject(loss.model, at_scale(factors, first.adapter), first.adapter.scale())
    attention = loss.model.config._attn_implementation
    if rate is None:
        batch = collate(first_step.examples(rows[:8]), attention)
        rate = factor * first_step.peak_lr(
            first_step.output_shift(loss, adapted, batch), first.adapter.scale(), STEPS
        )
    trainer = Trainer(loss, adapted, settings(rate), CPU)
    loader = StepLoader(rows, trainer.config.train, seed, attention)
    losses, measured = [], [round(evaluate(trainer, held_out, attention).loss, 5)]
    try:
        for step in trainer.steps(loader, 0, Schedule(trainer.config.train, rows)):
            losses.append(round(step.loss, 5))
            if step.step % (STEPS // 16) == 0:
                measured.append(round(evaluate(trainer, held_out, attention).loss, 5))
    except UserError as error:  # diverged
        print(error)
    ended = len(losses) == STEPS and math.isfinite(measured[-1])
    return {
        "rank": rank,
        "alpha": alpha,
        "lr": rate,
        "factor": factor,
        "losses": losses,
        "held_out": measured,
        "ended": ended,
    }


# Replay.


def replay(searches: list[dict[str, Any]]) -> str:
    rules: dict[str, Callable[[], Any] | None] = {
        "each to the end": None,
        "training losses, 1 of 4: the default": lambda: rule({"train.lr": {"choice": [1e-3]}}),
        "evaluations, 1 of 3": lambda: rule(
            {"train.steps": {"choice": [STEPS]}}, reduction=3, grace=6
        ),
        "evaluations, 1 of 4": lambda: rule(
            {"train.steps": {"choice": [STEPS]}}, reduction=4, grace=6
        ),
        "the first 4 at random, to the end": None,
    }
    rows = []
    for name, make in rules.items():
        found = [
            run(search, order[: 4 if "first" in name else TRIALS], make and make())
            for search in searches
            for order in orders(search["search"])
        ]
        compute, behind = np.array(found).T
        shares = [f"{(behind <= limit).mean():.0%}" for limit in (0, 0.005, 0.01)]
        rows.append(
            (name, f"{compute.mean():.3f}", *shares, f"{behind.mean():.2%}", f"{behind.max():.1%}")
        )
        if name.endswith("the default"):
            used, kept = compute.mean(), (behind <= 0.005).mean()
    titles = ("rule", "compute", "same winner", "within 0.5%", "within 1%", "behind", "at most")
    return (
        f"{len(searches)} searches of {TRIALS} trials, {ORDERS} orders of each\n{table(titles, rows)}\n"
        f"a search takes {used:.2f} of the compute of all trials to the end, target 0.20: {met(used <= 0.2)}; in"
        f" {kept:.0%} its winner is within 0.5% of the best, target 95%: {met(kept >= 0.95)}"
    )


def orders(seed: int) -> list[list[int]]:
    """Orders of the trials; the unchanged config stays the first."""
    draw = random.Random(seed)
    return [[0, *draw.sample(range(1, TRIALS), TRIALS - 1)] for _ in range(ORDERS)]


def rule(search: dict[str, Any], **settings: Any) -> Any:
    """The scheduler of a search in this space, as Tune gets it."""
    space = Space.model_validate({"search": search, "scheduler": {"kind": "asha", **settings}})
    planned: Any = SimpleNamespace(config=config("", {"name": ""}, train={"steps": STEPS}))
    spec = SweepSpec("replay", "nowhere", planned, space, "", 0.0)
    made = scheduler(Recorded(**vars(spec)))
    made.set_search_properties("eval/loss", "min")
    return made


class Recorded(SweepSpec):
    def total(self) -> int:
        return STEPS


def run(search: dict[str, Any], order: list[int], judge: Any) -> tuple[float, float]:
    """The share of all steps, and how far the winner is behind the best trial, as a share of the best one's gain."""
    trials, done = search["trials"], dict[int, int]()
    for number in order:
        stub = Trial(
            "stub", stub=True, trial_name_creator=lambda _, number=number: trial_name(number)
        )
        if judge:
            judge.on_trial_add(None, stub)
        parts = range(1, PARTS)
        stopped = (
            part
            for part in parts
            if judge and judged(judge, stub, trials[number], part) == TrialScheduler.STOP
        )
        done[number] = next(stopped, PARTS)
    last = [at(trial["held_out"], PARTS) for trial in trials]
    best = min(last)
    found = min(last[number] for number, parts in done.items() if parts == PARTS)
    return sum(done.values()) / (TRIALS * PARTS), (found - best) / (trials[0]["held_out"][0] - best)


def judged(judge: Any, stub: Any, trial: dict[str, Any], part: int) -> str:
    step = part * STEPS // PARTS
    latest = [at(trial["losses"], each) for each in range(STEPS) if step / 2 < each + 1 <= step]
    seen = {PROGRESS: WHOLE * part / PARTS, "eval/loss": at(trial["held_out"], part)}
    return str(
        judge.on_trial_result(
            None, stub, {**seen, **({PAIRED: np.mean(latest)} if step in (6, 24) else {})}
        )
    )


def at(losses: list[float], index: int) -> float:
    """A diverged trial has no more losses."""
    return losses[index] if index < len(losses) and math.isfinite(losses[index]) else 99.0


if __name__ == "__main__":
    main()
