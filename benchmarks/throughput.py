"""Training throughput beside PEFT with transformers' Trainer, on the same rows and rank, with one worker and with two.

Threads, precision, targets and scale are the same too. The model is SmolLM2-135M. Two workers of PEFT are in the
process group that TorchTrainer gives a training function written by hand.

Rows are chats of random tokens from a seeded generator; the cost of a token does not depend on its id. Lengths are
log-normal with median 120, cut at 512, and the second half of each row is supervised. Each contestant runs in its own
processes, one contestant after the other, for several rounds; the medians count. A run is one warm-up step, then one
timed pass over all rows with optimizer steps, but without logs, evaluations and checkpoints. Run it on an idle
machine: threads that wait for each other suffer most from other work; `--threads 1` and rows/CPU s suffer least.

First, each contestant's gradient of the mean loss over the first rows is compared, in float32, with the gradient of
these rows one by one, so that a fast wrong answer does not count.

    python benchmarks/throughput.py [--rows 64] [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, memory_store, met, model_folder, table
from contestants import LONGEST, Setting, make_rows
from torch.distributed.elastic.utils.distributed import get_free_port

GRADIENT_ROWS = 16
"""Number of rows for the comparison of gradients."""
CONTESTANT = str(Path(__file__).with_name("contestants.py"))
SETTINGS = (
    Setting("ours, 1 worker", "ours"),
    Setting("ours, 2 workers", "ours", workers=2),
    Setting("PEFT, 2 workers", "peft", micro=4, workers=2),
    Setting("PEFT, 1 worker", "peft", micro=4),
)
"""PEFT's batches have 4 rows, grouped by length: the fastest of 2, 4, 8 and 16."""
TARGETS = {1: 2.0, 2: 2.0}
"""Workers of both -> target ratio of rows per second."""
ANOTHER = 0.1
"""Distance to the reference gradient from which a contestant trains something else."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    folder = model_folder(MODEL, args.storage)
    settings = [setting for setting in SETTINGS if setting.workers <= args.threads]
    print(machine())
    print(rows_line(args.rows))
    off = gradients(settings, folder, args)
    print(f"\n{table(('gradient', 'off by'), [(name, f'{by:.1e}') for name, by in off.items()])}\n")
    results: dict[str, list[dict[str, float]]] = {setting.name: [] for setting in settings}
    for turn in range(args.rounds):
        for setting in settings:
            found = contest(setting, folder, args)
            results[setting.name].append(found)
            print(f"round {turn + 1}: {setting.name}: {found['rows']:.2f} rows/s", file=sys.stderr)
    middle = {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    print(results_table(results, middle))
    for workers, least in TARGETS.items():
        if workers <= args.threads:
            print(verdict(middle, workers, least))
    for name, by in off.items():
        if not by <= ANOTHER:  # it may be no number
            print(f"{name}: ITS GRADIENT IS OFF BY {by:.0%}, so none of its figures counts")


def rows_line(count: int) -> str:
    rows = make_rows(count)
    lengths = [len(ids) for ids, _ in rows]
    supervised = sum(int(marked.sum()) for _, marked in rows)
    packs = len(memory_store(rows, LONGEST))
    return (
        f"{count} rows, {sum(lengths)} tokens (median {median(lengths):.0f}, longest"
        f" {max(lengths)}), {supervised} supervised; {packs} packs of {LONGEST}"
    )


def gradients(settings: list[Setting], folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Return contestant -> distance of its gradient to the one of single rows."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "gradient.pt")
        job = {"folder": folder, "rows": GRADIENT_ROWS, "dtype": args.dtype, "gradient": file}
        run(Setting("alone", "alone"), job, args.threads)
        right = torch.load(file)
        for setting in settings:
            run(setting, job, args.threads)
            found[setting.name] = distance(torch.load(file), right)
    return found


def distance(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return |g - g'| / |g'| over all adapters."""
    assert found.keys() == right.keys(), "other parameters have a gradient"
    off = sum(
        float((found[name].double() - part.double()).square().sum()) for name, part in right.items()
    )
    return (off / sum(float(part.double().square().sum()) for part in right.values())) ** 0.5


def contest(setting: Setting, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one contestant; return rows and supervised tokens per second, and megabytes."""
    job = {"folder": folder, "rows": args.rows, "dtype": args.dtype, "gradient": ""}
    parts = run(setting, job, args.threads)
    seconds = max(part["seconds"] for part in parts)
    return {
        "rows": parts[0]["rows"] / seconds,
        "supervised": parts[0]["supervised"] / seconds,
        "rows_cpu": parts[0]["rows"] / sum(part["cpu"] for part in parts),
        "megabytes": sum(part["megabytes"] for part in parts),
    }


def run(setting: Setting, job: dict[str, Any], threads: int) -> list[dict[str, float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // setting.workers))}
    if setting.kind == "peft" and setting.workers > 1:
        # By these, transformers' Trainer finds its process group.
        workers = str(setting.workers)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
        environment |= {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
    processes = []
    with tempfile.TemporaryDirectory() as scratch:
        job = {**job, "setting": vars(setting), "scratch": scratch}
        for rank in range(setting.workers):
            if "WORLD_SIZE" in environment:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, CONTESTANT, json.dumps(job | {"rank": rank})]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
            )
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{setting.name} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def results_table(
    results: dict[str, list[dict[str, float]]], middle: dict[str, dict[str, float]]
) -> str:
    rows = []
    for name, found in middle.items():
        rates = [run["rows"] for run in results[name]]
        rows.append(
            (
                name,
                f"{found['rows']:.2f}",
                f"{found['supervised']:.0f}",
                f"{found['rows_cpu']:.2f}",
                f"{found['megabytes']:.0f}",
                f"{found['rows'] / middle['PEFT, 1 worker']['rows']:.2f}",
                f"{min(rates):.2f} to {max(rates):.2f}",
            )
        )
    header = ("", "rows/s", "supervised tokens/s", "rows/CPU s", "peak MB", "ratio")
    return table((*header, "rows/s, all rounds"), rows)


def verdict(middle: dict[str, dict[str, float]], workers: int, least: float) -> str:
    """Compare ours with PEFT, both with so many workers."""
    name = f"{workers} worker{'s' if workers > 1 else ''}"
    ours = middle[f"ours, {name}"]
    theirs = middle[f"PEFT, {name}"]
    ratio = ours["rows"] / theirs["rows"]
    memory = ours["megabytes"] / theirs["megabytes"]
    return (
        f"{name}: {ratio:.2f} times the rows/s of PEFT (target at least {least:g}:"
        f" {met(ratio >= least)}), {memory:.2f} times its memory (target below 1: {met(memory < 1)})"
    )


if __name__ == "__main__":
    main()
