"""The time of an update by AdamW and by the spectral step, as a share of a training step.

    python benchmarks/optimizers.py [--rounds 5]

SmolLM2-135M-Instruct, dequantised from Q4_1, in bfloat16; all linear layers; a step of 8 rows of 152 tokens. One
thread; CPU seconds; medians of steps, after each of which both optimizers update with the same gradient.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch
from common import MODEL, MemoryStore, config, machine, model_folder, our_trainer, table

from olora_ray.tokens.plan import Pack
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.optimizers.adamw import AdamW
from olora_ray.train.optimizers.spectral import Spectral

TOKENS, ROWS = 152, 8


class Both:
    """Both optimizers, with the seconds of their updates."""

    def __init__(self, trainer: Trainer) -> None:
        flat, train = trainer.flat, trainer.config.train
        sizes = {name: torch.ones(1) for name in trainer.adapted}
        self.flat = flat
        self.each = {
            "adamw": AdamW(flat, train),
            "spectral": Spectral(flat, train, sizes),
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self.each}

    def step(self, lr: float, norm: float | None = None) -> float:
        gradient = self.flat.grad.clone()
        for name, optimizer in self.each.items():
            self.flat.grad.copy_(gradient)
            began = time.process_time()
            optimizer.step(1e-6, norm)
            self.seconds[name].append(time.process_time() - began)
        return norm or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--storage", default="./runs", help="where the GGUF model is dequantised to"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = model_folder(MODEL, args.storage)
    print(machine())
    rows = [measured(rank, folder, args.rounds) for rank in (8, 16, 64)]
    print(
        table(
            ("rank", "step with AdamW", "AdamW's update", "spectral update", "time per step"), rows
        )
    )


def measured(rank: int, folder: str, rounds: int) -> tuple[str, ...]:
    train = {"global_batch": ROWS, "micro_batch": 4, "steps": rounds + 1}
    cfg = config("unused", {"name": "unused"}, adapter={"rank": rank, "alpha": rank}, train=train)
    trainer, attention = our_trainer(cfg, folder)
    both = trainer.optimizer = Both(trainer)
    draw = np.random.default_rng(0)
    supervised = np.arange(TOKENS) >= TOKENS // 2
    packs = [
        Pack(draw.integers(1000, 40_000, TOKENS), supervised, (TOKENS,))
        for _ in range(ROWS * (rounds + 1))
    ]
    store = MemoryStore(packs)
    steps, ended = [], time.process_time()
    for _ in trainer.steps(
        StepLoader(store, cfg.train, 0, attention), 0, Schedule(cfg.train, store)
    ):
        steps.append(
            time.process_time() - ended - sum(seconds[-1] for seconds in both.seconds.values())
        )
        ended = time.process_time()
    adamw, spectral = (median(seconds[1:]) for seconds in both.seconds.values())
    whole = median(steps[1:]) + adamw
    return (
        str(rank),
        f"{whole:.2f} s",
        f"{adamw:.3f} s",
        f"{spectral:.3f} s",
        f"{100 * (spectral - adamw) / whole:+.1f} %",
    )


if __name__ == "__main__":
    main()
