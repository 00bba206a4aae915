"""What it costs to be able to continue: checkpoints while training, and the time from a kill to the next step.

On the quickstart's model and batch. Checkpoints: blocks of ten steps, with one checkpoint written meanwhile
or without, in turn, in one process that has all threads; medians count, and the share is the median over
the pairs. Kills: pipelines/finetune.py with two workers, of which one is killed (SIGKILL) three steps after
a checkpoint; the time runs from the kill to the first step that is done again. Run it on an idle machine.

    python benchmarks/recovery.py [--rounds 7] [--kills 3]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import MODEL, config, machine, memory_store, model_folder, our_trainer, processes_below, table

from olora_ray.model.folder import parameters
from olora_ray.train.checkpoint import snapshot
from olora_ray.train.checkpoints import CheckpointManager, name_of
from olora_ray.train.loader import StepLoader
from olora_ray.train.schedule import Schedule
from olora_ray.train.state import TrainState

ROOT = Path(__file__).resolve().parent.parent
BLOCK, LENGTH = 10, 384


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--storage", default="./runs", help="where a GGUF model is dequantised to")
    args = parser.parse_args()
    folder = model_folder(MODEL, args.storage)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        _print_checkpoints(Path(scratch), folder, args.rounds)
        lost = [kill_one_worker(Path(scratch) / f"kill-{turn}", args.storage) for turn in range(args.kills)]
    if lost:
        shown = ", ".join(f"{seconds:.0f}" for seconds in sorted(lost))
        print(f"seconds from SIGKILL of a worker to the next step: {median(lost):.0f} (of {shown})")


def _print_checkpoints(scratch: Path, folder: str, rounds: int) -> None:
    found = checkpoints(scratch, folder, rounds)
    count = parameters(folder)
    trained = found["bytes"]
    rows = [
        ("with a checkpoint", f"{found['with']:.2f}", f"{found['cpu with']:.2f}"),
        ("without", f"{found['without']:.2f}", f"{found['cpu without']:.2f}"),
    ]
    print(table((f"{BLOCK} steps", "seconds", "CPU seconds"), rows))
    print(
        f"share of the training time at checkpoint_every {BLOCK}: {found['share']:+.1%} (pairs from"
        f" {found['least']:+.1%} to {found['most']:+.1%}); the training thread stands still for"
        f" {found['blocked'] * 1000:.0f} ms, {found['blocked'] / found['without']:.2%}"
    )
    print(f"a checkpoint is written in {found['write']:.2f} s, in the background, fsync included")
    print(
        f"a checkpoint takes {trained / 1e6:.0f} MB; one of the full model with AdamW's moments in float32 would take"
        f" {count * 12 / 1e6:,.0f} MB, {count * 12 / trained:.0f} times as much"
    )


def checkpoints(scratch: Path, folder: str, rounds: int) -> dict[str, float]:
    """Seconds of blocks with and without a checkpoint, and what one is."""
    cfg = config(
        str(scratch),
        {"name": folder},
        train={"global_batch": 2, "micro_batch": 1, "steps": 10**6, "schedule": "constant"},
        cluster={"workers": 1},
    )
    trainer, attention = our_trainer(cfg, folder)
    generator = np.random.default_rng(0)
    rows = [(generator.integers(3, 40_000, 96, dtype=np.int32), np.arange(96) >= 60) for _ in range(400)]
    store = memory_store(rows, LENGTH)
    steps = trainer.steps(StepLoader(store, cfg.train, 0, attention), 0, Schedule(cfg.train, store))
    files = CheckpointManager(str(scratch / "checkpoints"), 2)
    block(steps, None, trainer, 0)
    taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for turn in range(rounds):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            taken[kind].append(block(steps, files if kind == "with" else None, trainer, turn + 1))
    began = time.perf_counter()
    files.save(rounds + 1, written_state(trainer, rounds + 1))
    files.finish()
    written = time.perf_counter() - began
    newest = scratch / "checkpoints" / name_of(rounds + 1)
    shares = [a["seconds"] / b["seconds"] - 1 for a, b in zip(taken["with"], taken["without"], strict=True)]
    middle = {kind: {key: median(run[key] for run in runs) for key in runs[0]} for kind, runs in taken.items()}
    return {
        "with": middle["with"]["seconds"],
        "without": middle["without"]["seconds"],
        "cpu with": middle["with"]["cpu"],
        "cpu without": middle["without"]["cpu"],
        "blocked": middle["with"]["blocked"],
        "share": median(shares),
        "least": min(shares),
        "most": max(shares),
        "write": written,
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


def block(steps: Iterator[Any], files: CheckpointManager | None, trainer: Any, number: int) -> dict[str, float]:
    """Ten steps, of which the first is followed by a checkpoint; a block ends when it is on the disk."""
    start, used, blocked = time.perf_counter(), time.process_time(), 0.0
    next(steps)
    if files:
        began = time.perf_counter()
        files.save(number, written_state(trainer, number))
        blocked = time.perf_counter() - began
    for _ in islice(steps, BLOCK - 1):
        pass
    if files:
        files.finish()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "blocked": blocked}


def written_state(trainer: Any, step: int) -> Any:
    """What a worker hands over to be written: everything, and a best adapter of an earlier step."""
    return snapshot(trainer, TrainState(step), trainer.flat.vector.clone(), {}, "")


def kill_one_worker(storage: Path, models: str) -> float:
    """Seconds from the kill of a worker to the next step, in a run of the quickstart's settings."""
    storage.mkdir(parents=True)
    (storage / "models").symlink_to(Path(models).resolve() / "models")
    command = [sys.executable, "pipelines/finetune.py", f"run.storage={storage}", "train.steps=20", "data.eval=[]"]
    command += ["train.checkpoint_every=10", "train.log_every=1", "registry.model=null", "evaluation.scorer=null"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    killed = lost = 0.0
    resumed = False
    for line in process.stdout:
        if "step 13/" in line and not killed:
            os.kill(processes_below(process.pid, "RayTrainWorker")[-1], signal.SIGKILL)
            killed = time.perf_counter()
        resumed = resumed or "training continues after step" in line
        if resumed and not lost and " | loss " in line:
            lost = time.perf_counter() - killed
    if process.wait() or not lost:
        raise SystemExit("the run did not recover")
    return lost


if __name__ == "__main__":
    main()
