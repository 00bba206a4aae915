"""Cost of the fixed order of sums: the tree beside one flat all-reduce, and a simulation for many workers.

Measured in pairs, with the quickstart's model: steps whose gradients train/tree.py sums alternate with steps that
accumulate them in one buffer and all-reduce it. Both run in the same processes, on micro-batches of the same size;
the median of the pairs' ratios counts. Run it on an idle machine.

Simulated: the exchange of an 8B model's adapter (rank 16 on all linear layers of Llama 3 8B) among many workers. The
costs of a worker are measured here (adding, copying, starting a message); bandwidth and latency come from the
options. A ring all-reduce needs 2 (W - 1) turns of one latency each. The tree needs two, in each of which a worker
starts W - 1 messages per node of the tree that it has.

    python benchmarks/tree.py [--workers 2] [--pairs 15] [--models DIR] [--gigabits 25] [--latency 50]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import MODEL, config, machine, memory_store, model_folder, our_trainer, table
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.train import tree

LENGTH, EACH = 384, (1, 4)
"""Tokens per sequence, and micro-batches per worker, of the pairs."""
LAYER = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)} | {
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
ADAPTER = 32 * 16 * sum(m + n for m, n in LAYER.values())
"""Parameters of the adapter in the simulation."""
WORKERS = (8, 64, 512)


class FlatSum:
    """Replacement of tree.TreeSum: gradients accumulate in one buffer, and an all-reduce adds the workers' buffers."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def begin(self, leaves: int, again: range | None = None) -> None:
        self.whole.zero_()

    def take_over(self, leaf: int) -> bool:
        return False

    @contextmanager
    def leaf(self, number: int) -> Iterator[None]:
        yield

    def finish(self) -> None:
        if collectives.world_size() > 1:
            dist.all_reduce(self.whole)


@dataclass(frozen=True)
class Costs:
    add: float
    """Seconds to add one number to another."""
    keep: float
    """Seconds per number to copy a vector and clear it."""
    message: float
    """Seconds to start a message and to receive one."""


def main() -> None:
    arguments = parsed()
    if arguments.job:
        worker(json.loads(arguments.job))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(MODEL, arguments.models or scratch)
        print(machine())
        found = [pairs_of(arguments, folder, each, Path(scratch)) for each in EACH]
    rows = [
        (
            f"{arguments.workers} workers x {each}",
            f"{one['tree'] * 1000:.0f}",
            f"{one['flat'] * 1000:.0f}",
            f"{one['share']:+.2%}",
            f"{one['least']:+.2%} to {one['most']:+.2%}",
            str(tree.most_held(each * arguments.workers, arguments.workers)),
        )
        for each, one in zip(EACH, found, strict=True)
    ]
    print(
        table(
            ("micro-batches a step", "tree, ms", "flat, ms", "tree costs", "pairs", "vectors more"),
            rows,
        )
    )
    print()
    simulate(Costs(**found[0]["costs"]), arguments.gigabits, arguments.latency)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--models", help="folder for the converted model")
    parser.add_argument(
        "--gigabits",
        type=float,
        default=25.0,
        help="bandwidth of a worker's link in Gbit/s, per direction",
    )
    parser.add_argument(
        "--latency", type=float, default=50.0, help="latency of a message in microseconds"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs_of(
    arguments: argparse.Namespace, folder: str, each: int, scratch: Path
) -> dict[str, Any]:
    """Run pairs of steps with so many micro-batches per worker; return the measurements of rank 0."""
    job = {"folder": folder, "each": each, "workers": arguments.workers, "pairs": arguments.pairs}
    job |= {"meeting": str(scratch / f"meeting-{each}")}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--job", json.dumps(job | {"rank": rank})],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(arguments.workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a worker has failed")
    result: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return result


def worker(job: dict[str, Any]) -> None:
    from olora_ray.common.logs import quiet_transformers
    from olora_ray.train.loader import Schedule, StepLoader

    quiet_transformers()
    torch.set_num_threads(1)
    rank, workers = job["rank"], job["workers"]
    dist.init_process_group(
        "gloo", init_method=f"file://{job['meeting']}", rank=rank, world_size=workers
    )
    sizes = {
        "global_batch": workers * job["each"],
        "micro_batch": 1,
        "steps": 10**6,
        "schedule": "constant",
    }
    cfg = config(
        str(Path(job["meeting"]).parent),
        {"name": job["folder"]},
        train=sizes,
        cluster={"workers": workers},
    )
    trainer, attention = our_trainer(cfg, job["folder"])
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, 40_000, LENGTH, dtype=np.int32), np.arange(LENGTH) >= 200)
        for _ in range(200)
    ]
    store = memory_store(rows, LENGTH)
    steps = trainer.steps(
        StepLoader(store, cfg.train, 0, attention, rank, workers), 0, Schedule(cfg.train, store)
    )
    kinds = {"tree": trainer.gradient, "flat": FlatSum(trainer.flat.grad)}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(job["pairs"] + 1):
        for kind in sorted(kinds, reverse=bool(turn % 2)):
            trainer.gradient = kinds[kind]
            dist.barrier()
            taken[kind].append(seconds(lambda: next(islice(steps, 1))))
    costs = measured(trainer.flat.grad)
    shares = [a / b - 1 for a, b in zip(taken["tree"][1:], taken["flat"][1:], strict=True)]
    middle = {kind: median(times[1:]) for kind, times in taken.items()}
    found = {
        **middle,
        "share": median(shares),
        "least": min(shares),
        "most": max(shares),
        "costs": vars(costs),
    }
    print("\n" + json.dumps(found))
    dist.barrier()


def measured(vector: Tensor) -> Costs:
    other, size = torch.randn_like(vector), vector.numel()
    small = [torch.zeros(1) for _ in range(1000)]
    here, count = dist.get_rank(), dist.get_world_size()
    neighbours = (here + 1) % count, (here - 1) % count

    def messages() -> None:
        sends = [
            dist.P2POp(dist.isend, part, neighbours[0], tag=place)
            for place, part in enumerate(small)
        ]
        receives = [
            dist.P2POp(dist.irecv, part.clone(), neighbours[1], tag=place)
            for place, part in enumerate(small)
        ]
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()

    def keep() -> None:
        other.copy_(vector)
        vector.zero_()

    return Costs(
        add=best(lambda: other.add_(vector)) / size,
        keep=best(keep) / size,
        message=best(messages) / len(small) if count > 1 else 0.0,
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], object]) -> float:
    return min(seconds(work) for _ in range(7))


def simulate(costs: Costs, gigabits: float, latency: float) -> None:
    byte, turn = 8 / (gigabits * 1e9), latency * 1e-6
    rows = []
    for workers in WORKERS:
        for leaves in (workers, 4 * workers, 5 * workers):
            rows.append(simulated(costs, workers, leaves, byte, turn))
    print(
        f"simulated: {ADAPTER / 1e6:.1f} M numbers, {ADAPTER * 4 / 1e6:.0f} MB; {gigabits:g} Gbit/s and {latency:g} us"
        f" a message; measured here: {costs.add * 1e9:.2f} ns to add a number, {costs.keep * 1e9:.2f} ns to set it"
        f" aside, {costs.message * 1e6:.0f} us for a message"
    )
    header = (
        "workers",
        "micro-batches",
        "ring, s",
        "tree, s",
        "of it within a worker",
        "nodes a worker",
        "vectors more",
    )
    print(table(header, rows))


def simulated(costs: Costs, workers: int, leaves: int, byte: float, turn: float) -> Sequence[str]:
    everyone = tree.nodes_of(leaves, workers)
    nodes, most = sum(map(len, everyone)), max(map(len, everyone))
    moved = 4 * ADAPTER * (workers - 1) / workers * byte
    ring = 2 * (workers - 1) * turn + 2 * moved + ADAPTER * (workers - 1) / workers * costs.add
    # Each leaf except a worker's first one is copied once and added once; then the worker adds its slice of all nodes.
    within = (
        max(len(collectives.share(leaves, worker, workers)) - 1 for worker in range(workers))
        * ADAPTER
    )
    inside = within * (costs.add + costs.keep)
    started = (workers - 1) * (most + 1) * costs.message
    between = 2 * turn + started + (most + 1) * moved + ADAPTER / workers * (nodes - 1) * costs.add
    held = tree.most_held(leaves, workers)
    found = (f"{ring:.3f}", f"{inside + between:.3f}", f"{inside:.3f}", str(most), str(held))
    return (str(workers), str(leaves), *found)


if __name__ == "__main__":
    main()
