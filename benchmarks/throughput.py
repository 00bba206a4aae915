"""Training throughput beside PEFT with transformers' Trainer: same rows, threads, precision, rank, targets.

Rows are chats of random tokens (their cost does not depend on the ids) from a seeded generator: lengths
log-normal with median 120 cut at 512, the second half supervised. Each contestant runs in processes of its
own, one after the other, for several rounds; medians count. A run is one warm-up step, then one timed pass
over all rows, optimizer steps included, with nothing logged, evaluated or saved. Run it on an idle machine:
threads that wait for each other suffer most from others' work; `--threads 1` and rows/CPU s suffer least.

    python benchmarks/throughput.py [--rows 64] [--rounds 3]
    python benchmarks/throughput.py --tune        settings of both beside each other, to choose the best
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from common import MODEL, config, machine, memory_store, model_folder, our_trainer, table

from olora_ray.config.schema import Config

LONGEST, RANK, ROWS_A_STEP = 512, 16, 16


@dataclass(frozen=True)
class Setting:
    """One contestant."""

    name: str
    kind: str
    """ours or peft."""
    workers: int = 1
    micro: int = 2
    """Packs (ours) or rows (peft) in a micro-batch."""
    float32_adapters: bool = False
    """PEFT's autocast_adapter_dtype."""
    allocator: bool = False
    """Give PEFT the allocator setting of our workers too."""


OURS = (
    Setting("ours, 1 worker", "ours"),
    Setting("ours, 2 workers", "ours", workers=2),
)
PEFT_BEST = Setting("PEFT, batch 4, by length", "peft", micro=4)
TRIED = (
    *(Setting(f"ours, {n} packs", "ours", micro=n) for n in (1, 2, 4)),
    *(Setting(f"PEFT, batch {n}", "peft", micro=n) for n in (2, 4, 8, 16)),
    Setting("PEFT, batch 4, allocator as ours", "peft", micro=4, allocator=True),
    Setting("PEFT, batch 4, float32 adapters", "peft", micro=4, float32_adapters=True),
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
    settings = [s for s in (TRIED if args.tune else (*OURS, PEFT_BEST)) if s.workers <= args.threads]
    print(machine())
    print(_describe(make_rows(args.rows)))
    results: dict[str, list[dict[str, float]]] = {setting.name: [] for setting in settings}
    for turn in range(args.rounds):
        for setting in settings:
            results[setting.name].append(contest(setting, folder, args))
            rate = results[setting.name][-1]["rows"]
            print(f"round {turn + 1}: {setting.name}: {rate:.2f} rows/s", file=sys.stderr, flush=True)
    _print(results, base=settings[-1].name)


def make_rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, supervised) of each row."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(120), 0.6, count), 16, LONGEST).astype(int)
    return [(generator.integers(3, 40_000, n, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths]


def contest(setting: Setting, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one contestant in processes of its own; rows and supervised tokens a second, megabytes."""
    threads = str(max(1, args.threads // setting.workers))
    with tempfile.TemporaryDirectory() as scratch:
        job = {"setting": vars(setting), "folder": folder, "rows": args.rows, "dtype": args.dtype, "scratch": scratch}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "contestant", json.dumps(job | {"rank": rank})],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": threads},
                text=True,
            )
            for rank in range(setting.workers)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{setting.name} failed")
    parts = [json.loads(output.splitlines()[-1]) for output in outputs]
    seconds = max(part["seconds"] for part in parts)
    return {
        "rows": parts[0]["rows"] / seconds,
        "supervised": parts[0]["supervised"] / seconds,
        "rows_cpu": parts[0]["rows"] / sum(part["cpu"] for part in parts),
        "megabytes": sum(part["megabytes"] for part in parts),
    }


def contestant(job: dict[str, Any]) -> None:
    """The child process: run, then print what was done and the peak of its memory."""
    warnings.filterwarnings("ignore")
    from olora_ray.common.quiet import quiet_transformers

    quiet_transformers()
    setting = Setting(**job["setting"])
    run = run_ours if setting.kind == "ours" else run_peft
    done = run(setting, job)
    done["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(done))


def run_ours(setting: Setting, job: dict[str, Any]) -> dict[str, float]:
    """One pass with olora_ray's own feed, loss, adapters and optimizer."""
    import torch.distributed as dist

    from olora_ray.train.loader import StepLoader
    from olora_ray.train.schedule import Schedule

    if setting.workers > 1:
        meeting = f"file://{job['scratch']}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=job["rank"], world_size=setting.workers)
    store = memory_store(make_rows(job["rows"]), LONGEST)
    size = packs_a_step(store, setting)
    cfg = our_config(job, setting, size)
    trainer, attention = our_trainer(cfg, job["folder"])
    feed = StepLoader(store, cfg.train, cfg.run.seed, attention, job["rank"], setting.workers)
    steps = -(-len(store) // size)  # the last is filled up from the next pass; what is done is counted
    whole = Schedule(cfg.train.model_copy(update={"steps": steps}), store)
    deque(islice(trainer.steps(feed, 0, whole), 1), maxlen=0)
    taken = timed(lambda: deque(trainer.steps(feed, 0, whole), maxlen=0))
    done = [int(i) for i in store.order(cfg.run.seed, 0, steps * size)]
    rows = sum(len(store[i].segments) for i in done)
    return {**taken, "rows": rows, "supervised": store.supervised(done)}


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Seconds on the clock and of this process on a processor."""
    start, used = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def packs_a_step(store: Any, setting: Setting) -> int:
    """As near to ROWS_A_STEP rows as whole micro-batches allow."""
    rows_a_pack = sum(len(found.segments) for found in store) / len(store)
    share = setting.micro * setting.workers
    return max(1, round(ROWS_A_STEP / rows_a_pack / share)) * share


def our_config(job: dict[str, Any], setting: Setting, size: int) -> Config:
    """OLoRA on all linear layers, learning rate and clipping as PEFT's run has them."""
    return config(
        job["scratch"],
        {"name": job["folder"], "dtype": job["dtype"]},
        adapter={"rank": RANK, "alpha": RANK},
        train={"global_batch": size, "micro_batch": setting.micro, "lr": 1.0e-4, "schedule": "constant", "warmup": 0.0},
        cluster={"workers": setting.workers},
    )


def run_peft(setting: Setting, job: dict[str, Any]) -> dict[str, float]:
    """One pass of PEFT's OLoRA with transformers' Trainer, batches grouped by length."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from olora_ray.model.load import pick_dtype
    from olora_ray.train.malloc import keep_freed_memory

    if setting.allocator:
        keep_freed_memory()
    cfg = our_config(job, setting, setting.micro)
    dtype = pick_dtype(cfg.model, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights="olora")
    model = get_peft_model(model, lora, autocast_adapter_dtype=setting.float32_adapters)
    rows = make_rows(job["rows"])
    peft_trainer(model, rows[:ROWS_A_STEP], setting, job).train()
    trainer = peft_trainer(model, rows, setting, job)
    return {**timed(trainer.train), "rows": len(rows), "supervised": sum(int(marked.sum()) for _, marked in rows)}


def peft_trainer(
    model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]], setting: Setting, job: dict[str, Any]
) -> Any:
    """transformers' Trainer with nothing beside the training."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    examples = [{"input_ids": ids, "labels": np.where(marked, ids, -100), "length": len(ids)} for ids, marked in rows]
    arguments = TrainingArguments(
        output_dir=job["scratch"],
        per_device_train_batch_size=setting.micro,
        gradient_accumulation_steps=max(1, ROWS_A_STEP // setting.micro),
        train_sampling_strategy="group_by_length",
        num_train_epochs=1,
        learning_rate=1.0e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, data_collator=pad, train_dataset=Dataset.from_list(examples))


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows to the length of the longest."""
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [filler] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": stack("input_ids", 0), "labels": stack("labels", -100), "attention_mask": mask}


def _describe(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
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
    if sys.argv[1:2] == ["contestant"]:
        contestant(json.loads(sys.argv[2]))
        # A process group's threads can crash at the interpreter's exit; everything is printed.
        sys.stdout.flush()
        os._exit(0)
    main()
