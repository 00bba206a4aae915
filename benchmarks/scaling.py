"""From one worker to thousands: measurements on this machine, and a simulation that is based on them.

Measured are 1, 2 and 4 workers with gloo (more workers than cores share the cores). All have the same number of
threads and of sequences per step. The table has the factors of a share of the layers and their exchange, a step, the
exchange of the gradient (train/tree.py), and a checkpoint. The formula of that exchange is fitted to two workers and
compared with the measurement of four. The simulation (see benchmarks/simulation.py) uses the costs of one worker, and
a stated network and storage. For 8 to 4,096 workers it names the part that loses most time, and the number of workers
from which less than 90 % of the time is left for training.

    python benchmarks/scaling.py [--workers 1,2,4] [--steps 5] [--bandwidth 12.5e9] [--latency 30e-6]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from common import MODEL, machine, model_folder, table
from contestants import RANK
from simulation import EFFICIENT, Costs, exchanged, first_limit, simulate, without

from olora_ray.adapter.initialise import assign
from olora_ray.adapter.methods import method_named

WORKER = str(Path(__file__).with_name("scaling_worker.py"))
SIMULATED = (8, 64, 512, 4096)
STATED = (
    "bandwidth",
    "latency",
    "message",
    "storage_rate",
    "notice",
    "between_failures",
    "checkpoint_every",
    "hours",
)
"""Stated costs; each one is an option."""
Found = dict[str, Any]


def main() -> None:
    args = _arguments()
    folder = model_folder(args.model, args.storage)
    print(machine())
    cores = os.cpu_count() or 1
    threads = max(
        1, cores // max([workers for workers in args.workers if workers <= cores], default=1)
    )
    measured = {workers: measure(workers, threads, folder, args) for workers in args.workers}
    print(measured_table(measured))
    costs = replace(
        costs_of(measured[min(measured)], folder), **{name: getattr(args, name) for name in STATED}
    )
    print(f"\n{stated(costs)}")
    share = largest_share(measured[min(measured)]["shapes"])
    print(simulated_table(costs, share))
    print("\n".join(limits(costs, share)))


def measure(workers: int, threads: int, folder: str, args: argparse.Namespace) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "workers": workers,
            "folder": folder,
            "scratch": scratch,
            "launched": time.time(),
            **{
                name: getattr(args, name)
                for name in ("dtype", "micro", "accumulated", "steps", "rows")
            },
        }
        processes = [
            subprocess.Popen(
                [sys.executable, WORKER, json.dumps(job | {"rank": rank})],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                text=True,
            )
            for rank in range(workers)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{workers} workers failed")
    found: list[Found] = [json.loads(output.splitlines()[-1]) for output in outputs]
    slowest = {
        name: max(each[name] for each in found)
        for name in ("start", "step", "factor exchange", "exchange")
    }
    return {**found[0], **slowest, "threads": threads}


def measured_table(measured: Mapping[int, Found]) -> str:
    first = measured[min(measured)]
    rate = first["sequences"] / first["step"] / min(measured)
    rows = [
        (
            f"{workers} of {found['threads']} threads",
            *(
                f"{found['start']:.1f}",
                f"{max(found['factors']):.3f}",
                f"{found['factor exchange']:.3f}",
            ),
            *(f"{found['step']:.2f}", f"{found['sequences'] / found['step'] / workers / rate:.0%}"),
            *(f"{found['exchange'] * 1000:.1f}", _said(workers, measured)),
            *(f"{found['blocked'] * 1000:.0f}", f"{found['written']:.2f}"),
        )
        for workers, found in measured.items()
    ]
    header = (
        *("workers", "start s", "factors s", "exchanged s", "step s", "of one's rate"),
        *("exchange ms", "formula ms", "checkpoint stops ms", "written s"),
    )
    return table(header, rows)


def _said(workers: int, measured: Mapping[int, Found]) -> str:
    two = measured.get(2)
    if two is None or workers <= 2:
        return "-"
    bandwidth = two["gradient bytes"] / max(1e-9, two["exchange"] - two["message"])
    fitted = replace(
        costs_of(two, ""), latency=0.0, message=two["message"] / 2, bandwidth=bandwidth
    )
    return f"{exchanged(fitted, workers, fitted.gradient_bytes) * 1000:.1f}"


def costs_of(one: Found, folder: str) -> Costs:
    return Costs(
        factors=sum(one["factors"]),
        factor_bytes=sum(4 * RANK * (m + n) for m, n in one["shapes"].values()),
        gradient_bytes=int(one["gradient bytes"]),
        step=one["step"],
        blocked=one["blocked"],
        written=one["written"],
        start=one["start"],
        base_bytes=sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if folder
        else 0,
    )


def largest_share(shapes: Mapping[str, Sequence[int]]) -> Callable[[int], float]:
    known = {name: (m, n) for name, (m, n) in shapes.items()}
    cost = {name: method_named("olora").cost(m, n, RANK) for name, (m, n) in known.items()}

    @cache
    def share(workers: int) -> float:
        parts = assign(known, RANK, workers)
        return max(sum(cost[name] for name in part) for part in parts) / sum(cost.values())

    return share


def stated(costs: Costs) -> str:
    return (
        f"stated: {costs.bandwidth / 1e9:g} GB/s and {costs.latency * 1e6:g} us a message between workers, of which a"
        f" worker starts one in {costs.message * 1e6:g} us; storage"
        f" {costs.storage_rate / 1e9:g} GB/s in all; workers that all start again after a failure, as on GPUs, which is"
        f" noticed after {costs.notice:g} s, one a worker in"
        f" {costs.between_failures / 86400:g} days; a checkpoint every {costs.checkpoint_every} steps; a run of"
        f" {costs.hours:g} h; {costs.step:.2f} s a step"
    )


def simulated_table(costs: Costs, share: Callable[[int], float]) -> str:
    rows = []
    for workers in SIMULATED:
        found = simulate(costs, workers, share)
        rows.append(
            (
                f"{workers:,}",
                *(
                    f"{found.initialisation:.2f}",
                    f"{found.exchange * 1000:.1f}",
                    f"{found.exchange / found.step:.1%}",
                ),
                *(
                    f"{found.checkpoint:.2f}",
                    f"{found.recovery:.0f}",
                    f"{found.efficiency:.1%}",
                    found.limit,
                ),
            )
        )
    header = (
        *("simulated workers", "initialisation s", "exchange ms", "of a step", "checkpoint s"),
        *("recovery s", "left for training", "loses most"),
    )
    return table(header, rows)


def limits(costs: Costs, share: Callable[[int], float]) -> list[str]:
    """Return the number of workers from which too little time is left, the cause, and the next cause."""
    lines, causes = [], list[str]()
    while (found := first_limit(costs, share)) is not None and found.limit not in causes:
        besides = f" without {' and '.join(causes)}" if causes else ""
        lines.append(
            f"less than {EFFICIENT:.0%} is left for training from {found.workers:,} workers on{besides}: {found.limit}"
        )
        causes.append(found.limit)
        costs = without(costs, found.limit)
    return lines or [f"more than {EFFICIENT:.0%} is left for training at any number of workers"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4]
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro", type=int, default=2, help="packs per micro-batch")
    parser.add_argument(
        "--accumulated", type=int, default=1, help="micro-batches per worker and step"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    for name in STATED:
        default = getattr(Costs, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help="stated cost of the simulation",
        )
    return parser.parse_args()


if __name__ == "__main__":
    main()
