"""Share of the machine's matrix rate that the training reaches, and the parts that take the rest of the time.

The model and the rows are those of benchmarks/throughput.py, with one worker that has all threads. The machine's rate
is the best of torch.matmul over the shapes of the model's large products, in their precision. The work is the minimum
that any training of adapters must do: base forward and dX, low-rank paths, attention within each example, and the
output head over the supervised positions only (benchmarks/multiplications.py). The second share compares each product
with the rate of its own shape. Then one pass runs under torch.profiler; the last table includes the profiler's own
cost. Run it on an idle machine.

    python benchmarks/roofline.py [--rows 64] [--rounds 3] [--threads 2]
"""

import argparse
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, memory_store, model_folder, our_trainer, table
from contestants import LONGEST, Setting, make_rows, our_config, packs_a_step
from multiplications import Shapes, needed, products, rates, shapes_of, timed
from profiled import where

from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import order
from olora_ray.train.loader import Schedule, StepLoader

TARGET = 2 / 3
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--micro", type=int, default=2, help="packs per micro-batch")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="seconds to measure the rate of each shape"
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.storage)
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        training = Training(folder, args, scratch)
        _print(training, args)


class Training:
    def __init__(self, folder: str, args: argparse.Namespace, scratch: str) -> None:
        self.store = memory_store(make_rows(args.rows), LONGEST)
        setting = Setting("ours", "ours", micro=args.micro)
        self.size = min(packs_a_step(self.store, setting), max(1, len(self.store)))
        self.config = our_config(
            {"scratch": scratch, "folder": folder, "dtype": args.dtype}, setting, self.size
        )
        self.trainer, self.attention = our_trainer(self.config, folder)
        self.count = -(-len(self.store) // self.size)
        micro = [self.store[number] for number in range(min(args.micro, len(self.store)))]
        self.shapes: Shapes = shapes_of(self.trainer, collate(micro, self.attention))
        self.micro_tokens = sum(len(pack.input_ids) for pack in micro)
        self.micro_supervised = sum(int(pack.supervised.sum()) for pack in micro)

    def steps(self) -> Iterator[Any]:
        loader = StepLoader(self.store, self.config.train, self.config.run.seed, self.attention)
        schedule = Schedule(self.config.train.model_copy(update={"steps": self.count}), self.store)
        return self.trainer.steps(loader, 0, schedule)

    def done(self) -> list[Any]:
        places = order(len(self.store), self.config.run.seed, 0, self.count * self.size)
        return [self.store[int(place)] for place in places]

    def seconds(self, rounds: int) -> float:
        deque(islice(self.steps(), 1), maxlen=0)
        return median(timed(lambda: deque(self.steps(), maxlen=0), CPU) for _ in range(rounds))


def _print(training: Training, args: argparse.Namespace) -> None:
    packs = training.done()
    work = needed(
        training.shapes,
        [length for pack in packs for length in pack.segments],
        sum(int(pack.supervised.sum()) for pack in packs),
    )
    large = products(training.shapes, training.micro_tokens, training.micro_supervised)
    dtype = next(training.trainer.loss.model.parameters()).dtype
    found = rates(large, dtype, CPU, args.seconds)
    best = max(found.values())
    lines = [
        (
            f"{rows} x {inside} by {columns}",
            f"{rate / 1e9:.1f}",
            f"{large[rows, inside, columns] / total(large):.1%}",
        )
        for (rows, inside, columns), rate in found.items()
    ]
    print(
        table(
            (
                f"torch.matmul, {str(dtype).removeprefix('torch.')}",
                "GFLOP/s",
                "of the large products",
            ),
            lines,
        )
    )
    seconds = training.seconds(args.rounds)
    print(f"\n{work_table(work, sum(len(pack.input_ids) for pack in packs))}")
    print(f"\n{verdict(total(work), seconds, best, attainable(large, found))}\n")
    taken, profiled = where(training.trainer, training.steps)
    print(time_table(taken, profiled))


def work_table(work: dict[str, float], tokens: int) -> str:
    rows = [(name, f"{size / 1e9:.1f}", f"{size / total(work):.1%}") for name, size in work.items()]
    rows.append(("in all", f"{total(work) / 1e9:.1f}", ""))
    return f"{table(('work of a pass', 'GFLOP', 'share'), rows)}\n{total(work) / tokens / 1e9:.3f} GFLOP a token"


def verdict(work: float, seconds: float, best: float, own: float) -> str:
    """Compare the share of the rate with the target; `own` is the rate if each product reached that of its shape."""
    share = work / seconds / best
    met = "met" if share >= TARGET else "missed"
    return (
        f"a pass takes {seconds:.2f} s: {work / seconds / 1e9:.1f} GFLOP/s, {share:.1%} of the best rate,"
        f" {best / 1e9:.1f} GFLOP/s (target {TARGET:.0%}: {met}); {work / seconds / own:.1%} of the"
        " rate that products of these shapes reach alone"
    )


def attainable(large: dict[Any, float], found: dict[Any, float]) -> float:
    return total(large) / sum(size / found[shape] for shape, size in large.items())


def time_table(taken: dict[str, float], seconds: float) -> str:
    known = max(seconds, total(taken))
    rows = [(name, f"{spent:.2f}", f"{spent / known:.1%}") for name, spent in taken.items()]
    return table(
        ("a pass under the profiler", "seconds", "share"), [*rows, ("in all", f"{known:.2f}", "")]
    )


def total(parts: dict[Any, float] | Iterable[float]) -> float:
    numbers: Sequence[float] = list(parts.values()) if isinstance(parts, dict) else list(parts)
    return sum(numbers)


if __name__ == "__main__":
    main()
