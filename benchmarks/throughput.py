"""Training throughput beside PEFT with transformers' Trainer and with TRL's SFTTrainer: the same rows and rank.

All have the same threads, precision, targets and scale too.

Rows are chats of random tokens (their cost does not depend on the ids) from a seeded generator: lengths
log-normal with median 120 cut at 512, the second half supervised. Each contestant runs in processes of its
own, one after the other, for several rounds; medians count. A run is one warm-up step, then one timed pass
over all rows, optimizer steps included, with nothing logged, evaluated or saved. Run it on an idle machine:
threads that wait for each other suffer most from others' work; `--threads 1` and rows/CPU s suffer least.

First each contestant's gradient of the mean loss over the first rows is compared with that of the rows one by one,
each alone, in float32: a fast wrong answer does not count. TRL's packing "wrapped" lets rows see each other and cuts
them, its "bfd" keeps them apart only where positions are looked at.

    python benchmarks/throughput.py [--rows 64] [--rounds 3]
    python benchmarks/throughput.py --tune        settings of all beside each other, to choose the best

TRL takes part where it is installed: pip install -e '.[bench]'.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, memory_store, model_folder, table
from contestants import LONGEST, ROWS_A_STEP, Rows, Setting, make_rows, packs_a_step

GRADIENT_ROWS = 16
"""Of which gradients are compared."""
CONTESTANT = str(Path(__file__).with_name("contestants.py"))

OURS = (
    Setting("ours, 1 worker", "ours"),
    Setting("ours, 2 workers", "ours", workers=2),
)
PEFT_BEST = Setting("PEFT, batch 4, by length", "peft", micro=4)
TRL = (
    Setting("TRL, bfd, batch 1", "trl", micro=1, packing="bfd"),
    Setting("TRL, wrapped, batch 2", "trl", micro=2, packing="wrapped"),
)
TRIED = (
    *(Setting(f"ours, {n} packs", "ours", micro=n) for n in (1, 2, 4)),
    *(Setting(f"PEFT, batch {n}", "peft", micro=n) for n in (2, 4, 8, 16)),
    Setting("PEFT, batch 4, allocator as ours", "peft", micro=4, allocator=True),
    Setting("PEFT, batch 4, float32 adapters", "peft", micro=4, float32_adapters=True),
    *(Setting(f"TRL, {how}, batch {n}", "trl", micro=n, packing=how) for how in ("bfd", "wrapped") for n in (1, 2, 4)),
    *(Setting(f"TRL, padded, batch {n}", "trl", micro=n) for n in (2, 4)),
)


def main() -> None:
    """Run the contestants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="in all, over a contestant's workers")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--storage", default="./runs", help="where a GGUF model is dequantised to")
    args = parser.parse_args()
    folder = model_folder(args.model, args.storage)
    settings = [s for s in (TRIED if args.tune else (*OURS, *TRL, PEFT_BEST)) if s.workers <= args.threads]
    if find_spec("trl") is None:
        settings = [setting for setting in settings if setting.kind != "trl"]
        print("TRL is not installed: pip install -e '.[bench]'", file=sys.stderr)
    print(machine())
    print(_describe(make_rows(args.rows)))
    print(f"\n{gradients(settings, folder, args)}\n")
    results: dict[str, list[dict[str, float]]] = {setting.name: [] for setting in settings}
    for turn in range(args.rounds):
        for setting in settings:
            results[setting.name].append(contest(setting, folder, args))
            rate = results[setting.name][-1]["rows"]
            print(f"round {turn + 1}: {setting.name}: {rate:.2f} rows/s", file=sys.stderr, flush=True)
    _print(results, base=settings[-1].name)


def gradients(settings: Sequence[Setting], folder: str, args: argparse.Namespace) -> str:
    """The table of relative distances to the gradient that is right."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for setting in (Setting("alone", "alone"), *settings):
            files[setting.name] = file = str(Path(scratch) / f"{len(files)}.pt")
            run(setting, {"folder": folder, "rows": GRADIENT_ROWS, "dtype": args.dtype, "gradient": file}, args.threads)
        right = torch.load(files.pop("alone"))
        rows = [(name, f"{distance(torch.load(file), right):.1e}") for name, file in files.items()]
    return table(("gradient", "off by"), rows)


def distance(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """|g - g'| / |g'| over all adapters."""
    assert found.keys() == right.keys(), "other parameters have a gradient"
    off = sum(float((found[name].double() - part.double()).square().sum()) for name, part in right.items())
    return (off / sum(float(part.double().square().sum()) for part in right.values())) ** 0.5


def contest(setting: Setting, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one contestant; rows and supervised tokens a second, megabytes."""
    parts = run(setting, {"folder": folder, "rows": args.rows, "dtype": args.dtype, "gradient": ""}, args.threads)
    seconds = max(part["seconds"] for part in parts)
    return {
        "rows": parts[0]["rows"] / seconds,
        "supervised": parts[0]["supervised"] / seconds,
        "rows_cpu": parts[0]["rows"] / sum(part["cpu"] for part in parts),
        "megabytes": sum(part["megabytes"] for part in parts),
    }


def run(setting: Setting, job: dict[str, Any], threads: int) -> list[dict[str, float]]:
    """Have a contestant's workers do a job, and collect what each printed."""
    with tempfile.TemporaryDirectory() as scratch:
        job = {**job, "setting": vars(setting), "scratch": scratch}
        processes = [
            subprocess.Popen(
                [sys.executable, CONTESTANT, json.dumps(job | {"rank": rank})],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": str(max(1, threads // setting.workers))},
                text=True,
            )
            for rank in range(setting.workers)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{setting.name} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _describe(rows: Rows) -> str:
    lengths = [len(ids) for ids, _ in rows]
    store = memory_store(rows, LONGEST)
    sizes = {setting.name: packs_a_step(store, setting) for setting in OURS}
    return (
        f"{len(rows)} rows, {sum(lengths)} tokens (median {median(lengths):.0f}, longest {max(lengths)}), "
        f"{sum(int(marked.sum()) for _, marked in rows)} supervised; "
        f"{len(store)} packs of {LONGEST}, {100 * sum(lengths) / len(store) / LONGEST:.0f} % full\n"
        f"an optimizer step: PEFT {ROWS_A_STEP} rows; "
        + ", ".join(f"{name} {n} packs ({n * len(rows) / len(store):.1f} rows)" for name, n in sizes.items())
    )


def _print(results: dict[str, list[dict[str, float]]], base: str) -> None:
    middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()}
    rows = [
        (
            name,
            f"{found['rows']:.2f}",
            f"{found['supervised']:.0f}",
            f"{found['rows_cpu']:.2f}",
            f"{found['megabytes']:.0f}",
            f"{found['rows'] / middle[base]['rows']:.2f}",
            f"{min(run['rows'] for run in results[name]):.2f} to {max(run['rows'] for run in results[name]):.2f}",
        )
        for name, found in middle.items()
    ]
    print(table(("", "rows/s", "supervised tokens/s", "rows/CPU s", "peak MB", "ratio", "rows/s, all rounds"), rows))


if __name__ == "__main__":
    main()
