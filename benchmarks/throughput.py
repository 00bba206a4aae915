"""Training throughput beside PEFT with transformers' Trainer and with TRL's SFTTrainer, on the same rows and rank.

Threads, precision, targets and scale are the same too. The model is SmolLM2-135M, or a larger one with random
weights.

Rows are chats of random tokens from a seeded generator; the cost of a token does not depend on its id. Lengths are
log-normal with median 120, cut at 512, and the second half of each row is supervised. Each contestant runs in its own
processes, one contestant after the other, for several rounds; the medians count. A run is one warm-up step, then one
timed pass over all rows with optimizer steps, but without logs, evaluations and checkpoints. Run it on an idle
machine: threads that wait for each other suffer most from other work; `--threads 1` and rows/CPU s suffer least.

First, each contestant's gradient of the mean loss over the first rows is compared, in float32, with the gradient of
these rows one by one, so that a fast wrong answer does not count. TRL's packing "wrapped" lets rows attend to each
other and cuts them; its "bfd" separates them only in models that use the positions.

    python benchmarks/throughput.py [--rows 64] [--rounds 3] [--random 360m]
    python benchmarks/throughput.py --tune        settings of all beside each other, to choose the best

TRL takes part where it is installed: pip install -e '.[bench]'.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import MODEL, machine, memory_store, met, model_folder, table
from contestants import LONGEST, ROWS_A_STEP, Rows, Setting, make_rows, packs_a_step
from export import write_base
from torch.distributed.elastic.utils.distributed import get_free_port

GRADIENT_ROWS = 16
"""Number of rows for the comparison of gradients."""
CONTESTANT = str(Path(__file__).with_name("contestants.py"))

OURS = (
    Setting("ours, 1 worker", "ours"),
    Setting("ours, 2 workers", "ours", workers=2),
)
PEFT_BEST = Setting("PEFT, batch 4, by length", "peft", micro=4)
PEFT_TWO = Setting("PEFT, batch 4, by length, 2 workers", "peft", micro=4, workers=2)
"""In the process group that TorchTrainer gives a training function written by hand."""
TRL = (
    Setting("TRL, bfd, batch 1", "trl", micro=1, packing="bfd"),
    Setting("TRL, wrapped, batch 2", "trl", micro=2, packing="wrapped"),
)
TRIED = (
    *(Setting(f"ours, {n} packs", "ours", micro=n) for n in (1, 2, 4)),
    *(Setting(f"PEFT, batch {n}", "peft", micro=n) for n in (2, 4, 8, 16)),
    Setting("PEFT, batch 4, allocator as ours", "peft", micro=4, allocator=True),
    Setting("PEFT, batch 4, float32 adapters", "peft", micro=4, float32_adapters=True),
    *(
        Setting(f"TRL, {how}, batch {n}", "trl", micro=n, packing=how)
        for how in ("bfd", "wrapped")
        for n in (1, 2, 4)
    ),
    *(Setting(f"TRL, padded, batch {n}", "trl", micro=n) for n in (2, 4)),
)


TARGETS = {PEFT_BEST.name: 2.0, TRL[1].name: 2.5}
"""Peer -> target ratio of rows per second for one worker of ours, in less memory."""
WITH_TWO = 2.0
"""Target for two workers beside two of PEFT."""
ANOTHER = 0.1
"""Distance to the reference gradient from which a contestant trains something else."""
RANDOM = {
    "360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "1b": {},
}
"""Shapes of random models with SmolLM2's tokenizer: SmolLM2-360M and Llama 3.2 1B."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="total threads of a contestant's workers",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--random", choices=list(RANDOM), help="random weights with a larger shape")
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, args.storage)
        compete(random_model(Path(scratch), folder, args.random) if args.random else folder, args)


def random_model(scratch: Path, other: str, size: str) -> str:
    for file in Path(other).glob("*token*"):
        shutil.copy(file, scratch)
    count = write_base(scratch, vocab_size=49152, **RANDOM[size])
    print(f"random weights: {count / 1e6:,.0f} M parameters")
    return str(scratch)


def compete(folder: str, args: argparse.Namespace) -> None:
    settings = [
        s
        for s in (TRIED if args.tune else (*OURS, *TRL, PEFT_TWO, PEFT_BEST))
        if s.workers <= args.threads
    ]
    if find_spec("trl") is None:
        settings = [setting for setting in settings if setting.kind != "trl"]
        print("without TRL, which is not installed: pip install -e '.[bench]'")
    print(machine())
    print(_describe(make_rows(args.rows)))
    off = gradients(settings, folder, args)
    print(f"\n{table(('gradient', 'off by'), [(name, f'{by:.1e}') for name, by in off.items()])}\n")
    results: dict[str, list[dict[str, float]]] = {setting.name: [] for setting in settings}
    for turn in range(args.rounds):
        for setting in settings:
            results[setting.name].append(contest(setting, folder, args))
            rate = results[setting.name][-1]["rows"]
            print(
                f"round {turn + 1}: {setting.name}: {rate:.2f} rows/s", file=sys.stderr, flush=True
            )
    middle = {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    print(results_table(results, middle, base=settings[-1].name))
    print("\n".join(verdicts(middle, off)))


def gradients(
    settings: Sequence[Setting], folder: str, args: argparse.Namespace
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for setting in (Setting("alone", "alone"), *settings):
            files[setting.name] = file = str(Path(scratch) / f"{len(files)}.pt")
            run(
                setting,
                {"folder": folder, "rows": GRADIENT_ROWS, "dtype": args.dtype, "gradient": file},
                args.threads,
            )
        right = torch.load(files.pop("alone"))
        return {name: distance(torch.load(file), right) for name, file in files.items()}


def distance(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return |g - g'| / |g'| over all adapters."""
    assert found.keys() == right.keys(), "other parameters have a gradient"
    off = sum(
        float((found[name].double() - part.double()).square().sum()) for name, part in right.items()
    )
    return (off / sum(float(part.double().square().sum()) for part in right.values())) ** 0.5


def contest(setting: Setting, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one contestant; return rows and supervised tokens per second, and megabytes."""
    parts = run(
        setting,
        {"folder": folder, "rows": args.rows, "dtype": args.dtype, "gradient": ""},
        args.threads,
    )
    seconds = max(part["seconds"] for part in parts)
    return {
        "rows": parts[0]["rows"] / seconds,
        "supervised": parts[0]["supervised"] / seconds,
        "rows_cpu": parts[0]["rows"] / sum(part["cpu"] for part in parts),
        "megabytes": sum(part["megabytes"] for part in parts),
    }


def run(setting: Setting, job: dict[str, Any], threads: int) -> list[dict[str, float]]:
    port = str(get_free_port())

    def group(setting: Setting, rank: int) -> dict[str, str]:
        """Return the variables by which transformers' Trainer finds its process group."""
        if setting.kind == "ours" or setting.workers == 1:
            return {}
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": setting.workers,
            "LOCAL_WORLD_SIZE": setting.workers,
        }
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | {
            name: str(each) for name, each in place.items()
        }

    with tempfile.TemporaryDirectory() as scratch:
        job = {**job, "setting": vars(setting), "scratch": scratch}
        processes = [
            subprocess.Popen(
                [sys.executable, CONTESTANT, json.dumps(job | {"rank": rank})],
                stdout=subprocess.PIPE,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(max(1, threads // setting.workers)),
                    **group(setting, rank),
                },
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
        + ", ".join(
            f"{name} {n} packs ({n * len(rows) / len(store):.1f} rows)" for name, n in sizes.items()
        )
    )


def results_table(
    results: dict[str, list[dict[str, float]]], middle: dict[str, dict[str, float]], base: str
) -> str:
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
    return table(
        (
            "",
            "rows/s",
            "supervised tokens/s",
            "rows/CPU s",
            "peak MB",
            "ratio",
            "rows/s, all rounds",
        ),
        rows,
    )


def verdicts(middle: dict[str, dict[str, float]], off: dict[str, float]) -> list[str]:
    """Compare one worker of ours with each peer: the targets, and whether the peer's gradient is right."""
    ours = middle[OURS[0].name]
    lines = []
    for name, least in TARGETS.items():
        if name not in middle:
            lines.append(f"{name}: not measured")
            continue
        ratio, memory = (
            ours["rows"] / middle[name]["rows"],
            ours["megabytes"] / middle[name]["megabytes"],
        )
        wrong = f"; {name} trains something else: its gradient is off by {off[name]:.0%}"
        other = "" if off[name] <= ANOTHER else wrong
        lines.append(
            f"ours with 1 worker, compared with {name}: {ratio:.2f} times its rows/s (target at least {least:g}:"
            f" {met(ratio >= least)}), {memory:.2f} times its memory (target below 1: {met(memory < 1)}){other}"
        )
    if {two := OURS[1].name, theirs := PEFT_TWO.name} <= middle.keys():
        ratio = middle[two]["rows"] / middle[theirs]["rows"]
        lines.append(
            f"{two}: {ratio:.2f} times the rows/s of {theirs}, target {WITH_TWO:g}: {met(ratio >= WITH_TWO)}"
        )
    for name in (one.name for one in OURS if one.name in off):
        if not off[name] <= ANOTHER:  # it may be no number
            lines.append(
                f"{name}: ITS GRADIENT IS OFF BY {off[name]:.0%}, so none of these figures counts"
            )
    return lines


if __name__ == "__main__":
    main()
